"""What a request for embeddings asks for, and its way through the engine."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from engine.core.embedding_io import EmbeddingIO
from engine.core.messages import EmbedRequest
from engine.errors import InvalidRequest
from engine.server.context import ServerContext
from engine.server.fields import Fields
from engine.server.schema import ignored_names, read_prompts, read_rid, read_user

logger = logging.getLogger(__name__)

MAX_INPUTS = 2048
ENCODINGS = ("float", "base64")

_NEUTRAL: dict[str, tuple[Any, ...]] = {"modalities": (["text"],)}
"""Fields that ask for something not served here, with the values that ask for nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingRequest:
    """Checked, but for what depends on the model."""

    model: str
    inputs: list[str | list[int]]
    encoding_format: str
    dimensions: int | None
    prompt_name: str | None
    lora_path: str | None
    rid: str | None
    user: str | None
    ignored: tuple[str, ...]


def parse_embedding(body: dict[str, Any], vocab_size: int) -> EmbeddingRequest:
    """Raises `InvalidRequest` naming the field."""
    fields = Fields(body)
    fields.require("input")
    inputs = read_prompts(fields, "input", vocab_size, MAX_INPUTS)
    encoding_format = fields.text("encoding_format") or "float"
    if encoding_format not in ENCODINGS:
        raise fields.fail("encoding_format", f"must be float or base64, got {encoding_format!r:.40}")
    dimensions = fields.integer("dimensions")
    if dimensions is not None and dimensions < 1:
        raise fields.fail("dimensions", f"must be at least 1, got {dimensions}")
    fields.refuse(_NEUTRAL, _NEUTRAL)
    return EmbeddingRequest(
        model=fields.text("model") or "",
        inputs=inputs,
        encoding_format=encoding_format,
        dimensions=dimensions,
        prompt_name=fields.text("prompt_name"),
        lora_path=fields.text("lora_path"),
        rid=read_rid(fields),
        user=read_user(fields),
        ignored=ignored_names(fields),
    )


class Asks(Protocol):
    """What all requests for vectors say."""

    @property
    def model(self) -> str: ...
    @property
    def lora_path(self) -> str | None: ...
    @property
    def rid(self) -> str | None: ...
    @property
    def user(self) -> str | None: ...


def check_lora_path(embedding: EmbeddingIO, lora_path: str | None) -> None:
    """Raises `InvalidRequest` for an adapter where none can be used."""
    if lora_path and not embedding.info.takes_adapters:
        raise InvalidRequest(
            f"the model that embeds, {embedding.name!r}, takes no adapters",
            slug="unsupported_parameter",
            param="lora_path",
        )


async def compute_vectors(
    context: ServerContext,
    embedding: EmbeddingIO,
    asked: Asks,
    texts: Sequence[Sequence[int]],
    response_id: str,
    second_starts: Sequence[int] = (),
) -> np.ndarray:
    """Float32 [texts, size], with the adapter that was asked for; `second_starts` as in `EmbedRequest`. If
    the awaiting task is cancelled, so is the request.

    Raises: `InvalidRequest`, `NotFound`, `Overloaded` or another `EngineError` when it is refused or dies.
    Effects: until then it can be aborted by its `rid` and by `response_id`; logs one line about it.
    """
    adapter = None
    if embedding.info.takes_adapters:
        adapter = await context.adapters.use(asked.model, asked.lora_path)
    try:
        ref = None if adapter is None else adapter.ref
        request = EmbedRequest.of(response_id, texts, second_starts, ref)
        return await _compute(context, request, asked, embedding.info.size)
    finally:
        if adapter is not None:
            context.adapters.release(adapter)


async def _compute(context: ServerContext, request: EmbedRequest, asked: Asks, size: int) -> np.ndarray:
    response_id = request.request_id
    num_tokens = sum(request.lens)
    is_aborted = False

    def abort() -> None:
        nonlocal is_aborted
        is_aborted = True
        context.client.cancel(response_id)

    names = context.live.add(dict.fromkeys(filter(None, (response_id, asked.rid)), abort), abort)
    began_s, outcome = time.monotonic(), "error"
    try:
        answer = await context.client.embed(request)
        outcome = "ok"
        context.metrics.requests.inc()
        context.metrics.prompt_tokens.inc(num_tokens)
        context.metrics.prompt_lens.observe(num_tokens)
        context.metrics.e2e_latency.observe(time.monotonic() - began_s)
        return answer.matrix(size)
    except InvalidRequest:
        if is_aborted:
            outcome = "abort"
            context.metrics.aborted.inc()
            raise InvalidRequest("the request was aborted", slug="request_aborted") from None
        raise
    finally:
        context.live.remove(names)
        logger.info(
            "%s embedding texts=%d tokens=%d end=%s %.3fs%s",
            response_id,
            len(request.lens),
            num_tokens,
            outcome,
            time.monotonic() - began_s,
            "" if asked.user is None else f" user={asked.user!r}",
        )
