"""What a request for embeddings asks for, and its way through the engine."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import msgspec
import numpy as np
from sanic.request import Request

from engine.core.embedding_io import EmbeddingIO
from engine.core.messages import Embedded, EmbedRequest
from engine.errors import EngineError, InvalidRequest
from engine.server.adapter_hold import AdapterHold, aborted_error
from engine.server.auth import Client
from engine.server.context import ServerContext
from engine.server.deadline import Deadlines
from engine.server.error_map import CLIENT_CLOSED
from engine.server.fields import Fields
from engine.server.metrics import RequestTimer
from engine.server.rate_limits import RateLimits
from engine.server.request_id import request_id_of
from engine.server.request_log import endpoint_of, log_of
from engine.server.schema import ignored_names, read_prompts, read_rid, read_user

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
    http: Request,
    embedding: EmbeddingIO,
    asked: Asks,
    texts: Sequence[Sequence[int]],
    response_id: str,
    second_starts: Sequence[int] = (),
) -> np.ndarray:
    """Float32 [texts, size], with the adapter that was asked for; `second_starts` as in `EmbedRequest`. If
    the awaiting task is cancelled, so is the request.

    Raises: `InvalidRequest`, `NotFound`, `Overloaded` or another `EngineError` when it is refused or dies;
    what the limits of its client refuse.
    Effects: until then it can be aborted by its `rid` and by `response_id`; fills its line of the log.
    """
    client: Client = http.ctx.client
    request = EmbedRequest.of(
        response_id,
        texts,
        second_starts,
        client=client.name,
        weight=client.weight,
        trace_id=request_id_of(http),
    )
    run = _Run(context, request, asked, takes_adapters=embedding.info.takes_adapters)
    log = log_of(http)
    names = context.live.add(dict.fromkeys(filter(None, (response_id, asked.rid)), run.abort), run.abort)
    try:
        with run.reserved_tokens(client.limits):
            answer = await run.to_its_end()
        return answer.matrix(embedding.info.size)
    finally:
        context.live.remove(names)
        log.details = {
            "id": response_id,
            "texts": len(texts),
            "prompt_tokens": run.num_tokens,
            "end": run.outcome,
            "user": asked.user,
            "queue_ms": run.timer.timings["queue_ms"],
        }
        if run.outcome == "client":
            log.write(endpoint_of(http.route), CLIENT_CLOSED)


class _Run:
    """One request in the engine."""

    def __init__(
        self, context: ServerContext, request: EmbedRequest, asked: Asks, *, takes_adapters: bool
    ) -> None:
        self.num_tokens = sum(request.lens)
        self.timer = RequestTimer(context.metrics)
        self.outcome = "ok"
        """Or why it ended before its end: client, abort, or the code of an error."""
        self._context = context
        self._request = request
        self._asked = asked
        self._adapter = AdapterHold(context.adapters) if takes_adapters else None
        self._deadlines = Deadlines(context.config, context.client)
        self._is_admitted = False
        self._is_aborted = False

    def abort(self) -> None:
        self._is_aborted = True
        if self._adapter is not None:
            self._adapter.abort()
        self._context.client.cancel(self._request.request_id)

    @contextlib.contextmanager
    def reserved_tokens(self, limits: RateLimits | None) -> Iterator[None]:
        """Takes its tokens, and gives them back if it does not run. Raises a 429 `HttpError`."""
        if limits is not None:
            limits.take_tokens(self.num_tokens)
        try:
            yield
        finally:
            if limits is not None and not self._is_admitted:
                limits.give_back(self.num_tokens)

    async def to_its_end(self) -> Embedded:
        """Leaves nothing in the engine. Raises `EngineError` when it is refused or dies."""
        client = self._context.client
        try:
            async with self._deadlines.until_done():
                async with self._deadlines.until_run():
                    vectors = await client.embed(await self._with_adapter())
                self._is_admitted = True
                self.timer.admitted(self.num_tokens)
                answer = await vectors
        except BaseException as error:
            self._give_up(error)
            if self._is_aborted and isinstance(error, InvalidRequest):
                raise aborted_error() from None
            raise
        finally:
            if self._adapter is not None:
                self._adapter.release()
        self.timer.ended(0, None, is_complete=True, cause=None)
        return answer

    async def _with_adapter(self) -> EmbedRequest:
        if self._adapter is None:
            return self._request
        adapter = await self._adapter.find(self._asked.model, self._asked.lora_path)
        return msgspec.structs.replace(self._request, adapter=adapter)

    def _give_up(self, error: BaseException) -> None:
        self._context.client.cancel(self._request.request_id)
        if self._is_aborted:
            self.outcome = "abort"
        elif isinstance(error, asyncio.CancelledError):
            self.outcome = "client"
        else:
            self.outcome = error.slug if isinstance(error, EngineError) else "error"
        if self._is_admitted:
            self.timer.ended(0, None, is_complete=False, cause=self.outcome)
        elif self.outcome in ("abort", "client"):  # others are refusals, and counted as such
            self._context.metrics.count_cancellation(self.outcome)
