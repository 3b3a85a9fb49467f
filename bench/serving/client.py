"""A load client for any OpenAI server: streamed completions over kept connections.

Its own cost stays small: while requests run it only notes when bytes arrive. What they say is read
afterwards.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_S = 600.0
_LAST_CHUNK = b"\r\n0\r\n\r\n"
_HEAD_END = b"\r\n\r\n"


class BadAnswer(Exception):
    """The server did not do what was asked; timing it would be worth nothing."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """What one streamed answer says. `text_s` has the time of each event with text, by `perf_counter`.

    `token_ids` are empty unless the server was asked for them and gives them.
    """

    prompt_len: int
    sent_s: float
    text_s: list[float]
    num_tokens: int
    finish_reason: str | None
    token_ids_of_events: list[list[int]]

    @property
    def token_ids(self) -> list[int]:
        return [token_id for ids in self.token_ids_of_events for token_id in ids]

    @property
    def ttft_s(self) -> float:
        return self.text_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        """Between one event with text and the next."""
        return [late - early for early, late in zip(self.text_s, self.text_s[1:], strict=False)]


@dataclasses.dataclass(frozen=True)
class Answer:
    """One streamed answer as it came: the bytes, and when. The server counts a prompt of length None."""

    prompt_len: int | None
    max_tokens: int
    sent_s: float
    pieces: list[tuple[float, bytes]]

    def read(self, *, is_exact: bool | None = True) -> Completion:
        """Raises: `BadAnswer` unless it has exactly the tokens that were asked for.

        `is_exact` False: unless it came to its own end before. None: it may end either way.
        """
        text_s, token_ids = [], []
        usage, finish_reason = {}, None
        for arrived_s, event in self._events():
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                finish_reason = choice.get("finish_reason") or finish_reason
                if choice.get("token_ids"):
                    token_ids.append(choice["token_ids"])
                if choice.get("text") or choice.get("delta", {}).get("content"):
                    text_s.append(arrived_s)
            if "error" in event:
                raise BadAnswer(f"the server reports {event['error']}")
        num_tokens = usage.get("completion_tokens")
        wanted = self.max_tokens if is_exact else num_tokens
        prompt_len = usage.get("prompt_tokens") if self.prompt_len is None else self.prompt_len
        if num_tokens is None or (num_tokens, usage.get("prompt_tokens")) != (wanted, prompt_len):
            raise BadAnswer(f"asked for {self.prompt_len} tokens in, {self.max_tokens} out; got {usage}")
        ends = {True: ("length",), False: ("stop",), None: ("length", "stop")}[is_exact]
        if finish_reason not in ends or not text_s:
            raise BadAnswer(f"{len(text_s)} events with text, finish reason {finish_reason!r}")
        return Completion(prompt_len, self.sent_s, text_s, num_tokens, finish_reason, token_ids)

    def _events(self) -> Iterator[tuple[float, dict[str, Any]]]:
        """(time, JSON) of each event; it has arrived with the chunk that ends it."""
        waiting = b""
        for arrived_s, chunk in self._chunks():
            *events, waiting = (waiting + chunk).split(b"\n\n")
            for event in events:
                if event.startswith(b"data: ") and event != b"data: [DONE]":
                    yield arrived_s, json.loads(event[len(b"data: ") :])

    def _chunks(self) -> Iterator[tuple[float, bytes]]:
        """(time, bytes) of each chunk of the body; of a body that is not cut into chunks, each piece."""
        waiting, head = b"", b""
        for arrived_s, data in self.pieces:
            waiting += data
            if not head and _HEAD_END in waiting:
                head, _, waiting = waiting.partition(_HEAD_END)
                if head.split(b" ", 2)[1] != b"200":
                    raise BadAnswer(f"{head.splitlines()[0].decode()}: {waiting[:500].decode()}")
            if head and b"transfer-encoding: chunked" not in head.lower():
                yield arrived_s, waiting
                waiting = b""
            while head and b"\r\n" in waiting:
                size_line, _, rest = waiting.partition(b"\r\n")
                size = int(size_line.split(b";")[0], 16)
                if len(rest) < size + 2:
                    break
                yield arrived_s, rest[:size]
                waiting = rest[size + 2 :]


class _Connection(asyncio.Protocol):
    """One kept connection; one request at a time."""

    def __init__(self) -> None:
        self.is_open = False
        self._pieces: list[tuple[float, bytes]] = []
        self._answered: asyncio.Future[None] | None = None
        self._tail = b""
        self._bytes_left: int | None = None  # of an answer that says how long it is

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self.is_open = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(ConnectionError("the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        self._pieces.append((perf_counter(), data))
        if len(self._pieces) == 1:
            self._read_length(data)
        if self._bytes_left is None:
            self._tail = (self._tail + data)[-len(_LAST_CHUNK) :]
            is_last = self._tail == _LAST_CHUNK
        else:
            self._bytes_left -= len(data)
            is_last = self._bytes_left <= 0
        if is_last and self._answered is not None and not self._answered.done():
            self._answered.set_result(None)

    def _read_length(self, data: bytes) -> None:
        head, _, _ = data.partition(_HEAD_END)
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                self._bytes_left = len(head) + len(_HEAD_END) + int(line.split(b":")[1])

    async def ask(self, request: bytes) -> tuple[float, list[tuple[float, bytes]]]:
        """Send a request: when that was, and all of the answer."""
        self._pieces, self._tail, self._bytes_left = [], b"", None
        self._answered = asyncio.get_running_loop().create_future()
        sent_s = perf_counter()
        self._transport.write(request)
        async with asyncio.timeout(TIMEOUT_S):
            await self._answered
        return sent_s, self._pieces

    def close(self) -> None:
        self._transport.close()


class Client:
    """Asks one model of one server, over as many connections as requests run at once.

    `base_url` may end in /v1 or not. `extra` goes into every request beside what the workloads define.
    """

    def __init__(self, base_url: str, model: str, api_key: str = "EMPTY", **extra: Any) -> None:
        self._url = urlsplit(base_url.rstrip("/").removesuffix("/v1"))
        self._model = model
        self._api_key = api_key
        self._extra = extra
        self._idle: list[_Connection] = []

    async def complete(self, prompt: Sequence[int], max_tokens: int) -> Answer:
        """One streamed, greedy completion of exactly `max_tokens` tokens."""
        body = {"prompt": list(prompt), "max_tokens": max_tokens}
        return Answer(len(prompt), max_tokens, *await self._ask("/v1/completions", body))

    async def chat(self, content: str, max_tokens: int, **fields: Any) -> Answer:
        """One streamed, greedy answer to a user's message; how many tokens that is the server says."""
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": max_tokens, **fields}
        return Answer(None, max_tokens, *await self._ask("/v1/chat/completions", body))

    async def _ask(self, path: str, own: dict[str, Any]) -> tuple[float, list[tuple[float, bytes]]]:
        """When it was sent, and all that came."""
        body = {
            "model": self._model,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._extra,
            **own,
        }
        request = self._post(path, json.dumps(body).encode())
        # The server may have closed those that were idle for long.
        self._idle = [connection for connection in self._idle if connection.is_open]
        connection = self._idle.pop() if self._idle else await self._connect()
        try:
            sent_s, pieces = await connection.ask(request)
        except ConnectionError:  # closed just now
            connection = await self._connect()
            sent_s, pieces = await connection.ask(request)
        if connection.is_open:
            self._idle.append(connection)
        return sent_s, pieces

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self._url.hostname, self._url.port or 80)
        return connection

    def _post(self, path: str, body: bytes) -> bytes:
        head = (
            f"POST {self._url.path}{path} HTTP/1.1\r\nHost: {self._url.netloc}\r\n"
            f"Authorization: Bearer {self._api_key}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body
