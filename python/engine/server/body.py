"""Reading a request's body: bounded in size and time, JSON only."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import msgspec
from sanic.request import Request

from engine.config.limits import Limits
from engine.errors import InvalidRequest, Overloaded
from engine.server.byte_allowance import ByteShare
from engine.server.error_map import INVALID, HttpError

T = TypeVar("T")

_HIGH_HALF = re.compile(rb"\\u[dD][89abAB][\da-fA-F]{2}(?!\\u[dD][c-fC-F])")
_PAIR_CHARS = len(r"\ud83d\ude00")
_INLINE_BYTES = 8192
_LINGER_BYTES = 64 * 2**20
_LINGER_S = 5.0
_LINGER_SILENCE_S = 0.3


async def read_request(request: Request, parse: Callable[[dict[str, Any]], T]) -> T:
    """What `parse` makes of the JSON object in the body.

    Raises: `HttpError` 408, 413 or 415, `InvalidRequest` (slug invalid_json), and what `parse` raises.
    """
    _check_media_type(request)
    server = request.app.ctx.server
    with server.body_memory.share() as memory:
        content = await _read(request, server.limits, memory)
        return await run_sized(request, lambda: parse(_decode(content)))


async def run_sized(request: Request, work: Callable[[], T]) -> T:
    """Do `work` on a request: here if that is small, else in a thread, so that others go on.

    Raises: what `work` raises, but for its `RecursionError`, which is the request's: `InvalidRequest`. What
    could just be read may still be nested too deeply to be written again from a few calls further down.
    """
    try:
        if (request.stream.request_bytes or 0) <= _INLINE_BYTES:
            return work()
        return await asyncio.to_thread(work)
    except RecursionError:
        raise InvalidRequest("the JSON body is nested too deeply", slug="invalid_json") from None


def _decode(content: bytes) -> dict[str, Any]:
    try:
        with _no_garbage_collection():
            value = msgspec.json.decode(content)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        reason = "it holds half of a surrogate pair" if _is_half_pair(error, content) else error
        raise InvalidRequest(f"the body is not valid JSON: {reason}", slug="invalid_json") from None
    if not isinstance(value, dict):
        raise InvalidRequest("the body must be a JSON object", slug="invalid_json")
    return value


def _is_half_pair(error: Exception, content: bytes) -> bool:
    """Whether an escape stands for no character; the decoder has four odd sentences for that."""
    is_near_end = _HIGH_HALF.search(content[-_PAIR_CHARS:]) is not None
    return "utf-16 surrogate" in str(error) or (is_near_end and "truncated" in str(error))


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A million small arrays would set off collection after collection, and nothing of it is garbage."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _check_media_type(request: Request) -> None:
    media_type = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if media_type != "application/json":
        raise HttpError(
            415,
            INVALID,
            "unsupported_media_type",
            f"Content-Type must be application/json, got {media_type!r}.",
        )
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HttpError(415, INVALID, "unsupported_media_type", "Compressed bodies are not supported.")


async def _read(request: Request, limits: Limits, memory: ByteShare) -> bytes:
    stream, pieces, num_bytes = request.stream, [], 0
    if stream.request_body and (stream.request_bytes or 0) > limits.body_bytes:  # as announced
        await _discard(stream, 0)
        raise _too_large(limits)
    try:
        async with contextlib.nullcontext() if _is_there(stream) else asyncio.timeout(limits.receive_s):
            while stream.request_body and (piece := await stream.read()) is not None:
                num_bytes += len(piece)
                if num_bytes > limits.body_bytes:
                    await _discard(stream, num_bytes)
                    raise _too_large(limits)
                if not memory.grow(num_bytes):
                    pieces.clear()
                    await _discard(stream, num_bytes)
                    raise Overloaded("Too many large requests arrive at once.", slug="bodies_too_large")
                pieces.append(piece)
    except TimeoutError:
        raise HttpError(408, INVALID, "request_timeout", "The body did not arrive in time.") from None
    # The transport may still be paused by a large body; unless it reads, a vanished client goes unseen.
    if request.transport is not None:
        request.transport.resume_reading()
    return b"".join(pieces)


def _is_there(stream: Any) -> bool:
    """Whether all of the body has arrived: a small one comes together with its headers."""
    is_announced = stream.request_body is True and not stream.expecting_continue
    return is_announced and len(stream.recv_buffer) >= stream.request_bytes_left


async def _discard(stream: Any, num_bytes: int) -> None:
    """Swallow some of a body that is refused: a client still writing would never read the answer."""
    if stream.expecting_continue:  # it waits to be told to begin
        return
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _LINGER_S
    try:
        while num_bytes < _LINGER_BYTES and loop.time() < deadline:
            async with asyncio.timeout(_LINGER_SILENCE_S):
                if (piece := await stream.read()) is None:
                    return
            num_bytes += len(piece)
    except TimeoutError:
        pass


def _too_large(limits: Limits) -> HttpError:
    message = f"The request body exceeds {limits.body_bytes} bytes."
    return HttpError(413, INVALID, "body_too_large", message)
