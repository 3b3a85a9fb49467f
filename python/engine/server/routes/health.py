"""GET /health and /ready, answered from flags alone, and /health_generate, which computes a token."""

from __future__ import annotations

import asyncio
import uuid

from sanic import HTTPResponse, Sanic
from sanic.request import Request

from engine.core.client import EngineClient
from engine.core.messages import EmbedRequest, EngineReady, GenerateRequest
from engine.errors import Overloaded
from engine.sampling.params import SamplingParams
from engine.server.context import ServerContext
from engine.server.json_response import json_response

GENERATE_TIMEOUT_S = 20.0
_PROMPT = bytes(4)  # token 0, which every model has


def add_routes(app: Sanic, context: ServerContext) -> None:
    @app.get("/health", ignore_body=True)
    async def health(_request: Request) -> HTTPResponse:
        if (error := context.unready) is not None:
            raise error
        return json_response({"status": "ok"})

    @app.get("/ready", ignore_body=True)
    async def ready(_request: Request) -> HTTPResponse:
        if (error := context.unready) is not None:
            raise error
        return json_response({"status": "ready"})

    @app.get("/health_generate", ignore_body=True)
    async def health_generate(_request: Request) -> HTTPResponse:
        _, ready = context.require_ready()
        try:
            async with asyncio.timeout(GENERATE_TIMEOUT_S):
                await _try(context.client, ready)
        except TimeoutError:
            raise Overloaded(
                f"The engine made no token in {GENERATE_TIMEOUT_S:g} seconds.", slug="queue_timeout"
            ) from None
        return json_response({"status": "ok"})


async def _try(client: EngineClient, ready: EngineReady) -> None:
    """Returns when a token is there, or a vector from an engine that makes nothing else."""
    if ready.generates:
        await _generate_token(client)
    else:
        await client.embed(EmbedRequest.of(f"health-{uuid.uuid4().hex}", [[0]]))


async def _generate_token(client: EngineClient) -> None:
    """Returns when a token is there. Raises what a request is refused with."""
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    request = GenerateRequest(request_id=f"health-{uuid.uuid4().hex}", prompt=_PROMPT, params=params)
    stream = await client.submit(request)
    try:
        async for chunk in stream:
            if chunk.finish_reason is not None:
                break
    finally:
        client.cancel(request.request_id)  # ignored when it has come to its end
