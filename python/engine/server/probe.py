"""The smallest request: it tells whether the engine computes at all, and is the first of every server."""

from __future__ import annotations

import uuid

from engine.core.client import EngineClient
from engine.core.messages import EmbedRequest, EngineReady, GenerateRequest
from engine.sampling.params import SamplingParams

_PROMPT = bytes(4)  # token 0, which every model has


async def compute_something(client: EngineClient, ready: EngineReady) -> None:
    """Returns when a token is there, or a vector from an engine that makes nothing else.

    Raises: what a request is refused with, or dies of.
    """
    if ready.generates:
        await _generate_token(client)
    else:
        await _embed_text(client)


async def _embed_text(client: EngineClient) -> None:
    request = EmbedRequest.of(f"health-{uuid.uuid4().hex}", [[0]])
    try:
        await (await client.embed(request))
    finally:
        client.cancel(request.request_id)  # ignored when it has come to its end


async def _generate_token(client: EngineClient) -> None:
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    request = GenerateRequest(request_id=f"health-{uuid.uuid4().hex}", prompt=_PROMPT, params=params)
    stream = await client.submit(request)
    try:
        async for chunk in stream:
            if chunk.finish_reason is not None:
                break
    finally:
        client.cancel(request.request_id)  # ignored when it has come to its end
