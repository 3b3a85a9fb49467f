"""Server-sent events: the bytes of each event, and the way they go out.

Events are cut from templates that are built once a response; per token only the text is encoded.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Mapping
from time import monotonic
from types import TracebackType
from typing import Any

import msgspec
from sanic.headers import format_http1_response
from sanic.http.constants import Stage
from sanic.request import Request

HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
CONTENT_TYPE = "text/event-stream; charset=utf-8"
DONE = b"data: [DONE]\n\n"
_COMMENT = b": keep-alive\n\n"
_WRITE_BYTES = 1 << 14
"""Held events are written when they are that large together: a larger write costs hardly less."""

encode_json = msgspec.json.encode


class Events:
    """The events of one response, of either kind of completion.

    `usage`, where an event takes it, is what to put into its `usage` field; events without one
    carry null if the client asked for usage at all, and no such field otherwise.
    """

    def __init__(
        self, *, object_name: str, response_id: str, created: int, model: str, has_usage: bool
    ) -> None:
        common = {"id": response_id, "object": object_name, "created": created, "model": model}
        self._head = b"data: " + encode_json(common)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if has_usage else b"]}\n\n"
        self._plain_tail = b',"logprobs":null,"finish_reason":null}' + self._tail  # of nearly all events

    def role(self, index: int, content: str | None = "", **extra: Any) -> bytes:
        """Chat: the choice exists. `extra` goes beside `choices`."""
        return self._event(
            b'{"index":%d,"delta":{"role":"assistant","content":%b},"logprobs":null,"finish_reason":null}'
            % (index, encode_json(content)),
            **extra,
        )

    def delta(
        self,
        index: int,
        text: str,
        logprobs: Any = None,
        usage: dict[str, Any] | None = None,
        fields: Mapping[str, Any] | None = None,
    ) -> bytes:
        """Chat: more text. `fields` are further ones of the choice."""
        return self.part(index, {"content": text}, logprobs, usage, fields)

    def part(
        self,
        index: int,
        part: Mapping[str, Any],
        logprobs: Any = None,
        usage: dict[str, Any] | None = None,
        fields: Mapping[str, Any] | None = None,
    ) -> bytes:
        """Chat: more of the message. `fields` are further ones of the choice."""
        if logprobs is None and usage is None and not fields:
            return b'%b{"index":%d,"delta":%b%b' % (self._head, index, encode_json(part), self._plain_tail)
        return self._event(
            b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":null%b}'
            % (index, encode_json(part), encode_json(logprobs), _more(fields)),
            usage,
        )

    def end(self, index: int, finish_reason: str, matched_stop: str | int | None, **extra: Any) -> bytes:
        """Chat: the choice is complete. `extra` goes beside `choices`."""
        choice = {
            "index": index,
            "delta": {},
            "logprobs": None,
            "finish_reason": finish_reason,
            "matched_stop": matched_stop,
        }
        return self._event(encode_json(choice), **extra)

    def more_text(self, index: int, text: str) -> bytes:
        """Text completion: more text, and nothing else; what `text` would give."""
        return b'%b{"index":%d,"text":%b%b' % (self._head, index, encode_json(text), self._plain_tail)

    def text(
        self,
        index: int,
        text: str,
        logprobs: Any = None,
        finish_reason: str | None = None,
        matched_stop: str | int | None = None,
        fields: Mapping[str, Any] | None = None,
        **extra: Any,
    ) -> bytes:
        """Text completion: more text, perhaps the last. `fields` are further ones of the choice, `extra`
        goes beside `choices`.
        """
        if finish_reason is None:
            choice = b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":null%b}'
            return self._event(
                choice % (index, encode_json(text), encode_json(logprobs), _more(fields)), **extra
            )
        last = {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
            "matched_stop": matched_stop,
            **(fields or {}),
        }
        return self._event(encode_json(last), **extra)

    def usage(self, usage: dict[str, Any], **extra: Any) -> bytes:
        """The totals; the only event without a choice."""
        return self._event(b"", usage, **extra)

    def _event(self, choice: bytes, usage: dict[str, Any] | None = None, **extra: Any) -> bytes:
        present = {name: value for name, value in extra.items() if value is not None}
        if usage is None and not present:
            return self._head + choice + self._tail
        tail = self._tail if usage is None else b'],"usage":' + encode_json(usage) + b"}\n\n"
        if present:
            tail = tail.removesuffix(b"}\n\n") + b"," + encode_json(present)[1:-1] + b"}\n\n"
        return self._head + choice + tail


def _more(fields: Mapping[str, Any] | None) -> bytes:
    return b"," + encode_json(fields)[1:-1] if fields else b""


def error_event(body: bytes) -> bytes:
    return b"data: " + body + b"\n\n"


class EventStream:
    """The open response: sends events, comments when there are none, and gives up on a dead reader.

    `keep_alive_s` is the silence after which a comment is sent, 0 for none.
    One timer serves both purposes, so that a token costs none of its own.
    """

    def __init__(
        self, request: Request, headers: dict[str, str], *, keep_alive_s: float, send_s: float
    ) -> None:
        self._request = request
        self._headers = headers
        self._keep_alive_s = keep_alive_s or math.inf
        self._send_s = send_s
        self._last_sent = monotonic()
        self._sending_since: float | None = None
        self._held = b""
        self._has_begun = False
        """Whether the headers are out."""
        self._is_chunked = request.version != "1.0"
        self._connection = request.stream.protocol
        self._comment: asyncio.Task[None] | None = None

    async def __aenter__(self) -> EventStream:
        self._response = await self._request.respond(
            status=200, headers={**HEADERS, **self._headers}, content_type=CONTENT_TYPE
        )
        if not self._is_chunked:
            await self._begin_plain()
        self._loop = asyncio.get_running_loop()
        self._watch()
        return self

    async def _begin_plain(self) -> None:
        """Send the headers of an answer that ends with its connection: HTTP/1.0 knows no chunks."""
        http, self._response.headers["connection"] = self._request.stream, "close"
        http.keep_alive = False

        async def send(data: bytes, end_stream: bool) -> None:
            if data:
                await self._connection.send(data)
            if end_stream:
                http.response_func, http.stage = None, Stage.IDLE

        http.response_func, http.stage = send, Stage.RESPONSE
        await self._connection.send(format_http1_response(200, self._response.processed_headers))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                await self._write(b"", is_last=True)
        finally:
            self._timer.cancel()
            if self._comment is not None:
                self._comment.cancel()

    async def send(self, event: bytes) -> None:
        """Effects: waits while the client reads more slowly than events are made."""
        await self._write(event, is_last=False)

    async def send_all(self, events: Iterable[bytes]) -> None:
        """Send events in few writes; one of them, for the headers, if there is no event."""
        await self.hold_all(events)
        await self.send(b"")

    async def hold_all(self, events: Iterable[bytes]) -> None:
        """Send events as far as they are many; the rest is held."""
        for event in events:
            self.hold(event)
            if self.is_full:
                await self.flush()

    def hold(self, event: bytes) -> None:
        """Keep an event until the next is sent, or the response ends: a write costs more than an event."""
        self._held += event

    @property
    def is_full(self) -> bool:
        """Whether so much is held that it had better be sent."""
        return len(self._held) >= _WRITE_BYTES

    async def flush(self) -> None:
        """Send what is held, if there is anything, and headers that are not out. Effects: as `send`."""
        if self._held or not self._has_begun:
            await self._write(b"", is_last=False)

    async def _write(self, event: bytes, *, is_last: bool) -> None:
        if self._held:
            event, self._held = self._held + event, b""
        self._last_sent = self._sending_since = monotonic()
        if is_last or not self._has_begun or not self._is_chunked:
            await self._response.send(event, is_last)
            self._has_begun = True
        elif event:  # what the framework would send, by a shorter way
            await self._connection.send(b"%x\r\n%b\r\n" % (len(event), event))
        self._sending_since = None

    def _watch(self) -> None:
        """Look after the stream now, and again when there may be something to do."""
        now = monotonic()
        if self._sending_since is None:
            wait_s = self._last_sent + self._keep_alive_s - now
            if wait_s <= 0:
                self._comment = self._loop.create_task(self.send(_COMMENT))
                wait_s = self._keep_alive_s
        else:
            wait_s = self._sending_since + self._send_s - now
            if wait_s <= 0:
                # The handler is cancelled by the loss of the connection, as with any other.
                self._request.transport.abort()
                return
        self._timer = self._loop.call_later(min(max(wait_s, 0.01), self._send_s), self._watch)
