"""The results of requests on the text side: sorted to their streams as they arrive."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Iterable

from engine.core.messages import (
    Admitted,
    Embedded,
    EmbedRequest,
    Failed,
    GenerateRequest,
    TokenChunk,
    ToServer,
)
from engine.core.reading_pace import ReadingPace
from engine.errors import EngineError, InvalidRequest, Overloaded

_MOST_AT_ONCE = 8
"""Chunks that a reader takes before it lets others run: whoever has much to catch up on holds nobody up."""


class TokenStream:
    """Implements `RequestStream`. Belongs to one event loop, and to one reader."""

    def __init__(self, request: GenerateRequest) -> None:
        self.request = request
        self.max_unread: int | None = None
        self.is_overrun = False
        self.was_computed = False
        """Whether it has come as far as a first result."""
        self.was_refused = False
        """Whether the engine ended it before it ran."""
        self.admission: asyncio.Future[Admitted] = asyncio.get_running_loop().create_future()
        self._chunks: deque[TokenChunk] = deque()
        self._open = set(range(request.n))
        self._error: EngineError | None = None
        self._reader: asyncio.Future[None] | None = None
        """Resolved when there is something new for a reader that waits."""
        self._num_at_once = 0
        self.last_woken_s = 0.0

    @property
    def admitted(self) -> Admitted:
        return self.admission.result()

    @property
    def is_open(self) -> bool:
        """Whether a choice is still to come to its end."""
        return bool(self._open) and self._error is None

    @property
    def has_unread(self) -> bool:
        """Whether the next chunk is there already."""
        return bool(self._chunks)

    def __aiter__(self) -> AsyncIterator[TokenChunk]:
        return self

    async def __anext__(self) -> TokenChunk:
        if self._num_at_once == _MOST_AT_ONCE:
            self._num_at_once = 0
            await asyncio.sleep(0)
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if not self._open:
                raise StopAsyncIteration
            self._num_at_once = 0
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        self._num_at_once += 1
        return self._chunks.popleft()

    def push(self, chunk: TokenChunk) -> bool:
        """A chunk arrives; ignored when its choice has ended. The reader has yet to be woken.

        Returns whether the stream is still open.
        """
        self.was_computed = True
        if chunk.choice not in self._open:
            return self.is_open
        self._chunks.append(chunk)
        if self.max_unread is not None and len(self._chunks) > self.max_unread:
            self.is_overrun = True
            self.fail(Overloaded("The client reads too slowly.", slug="slow_reader"))
        if chunk.finish_reason is not None:
            self._open.discard(chunk.choice)
        return bool(self._open) and self._error is None

    def wake(self) -> None:
        """Let a reader that waits go on."""
        reader, self._reader = self._reader, None
        if reader is not None and not reader.done():
            reader.set_result(None)

    def end_choice(self, choice: int) -> None:
        """No more of this choice, and what has not been read of it is dropped."""
        self._open.discard(choice)
        self._chunks = deque(chunk for chunk in self._chunks if chunk.choice != choice)
        self.wake()

    def fail(self, error: EngineError) -> None:
        """The request died; its reader is told after what arrived before."""
        self._error = error
        if not self.admission.done():
            self.admission.set_exception(error)
            self.admission.exception()  # taken note of: the waiter may be gone
        self.wake()

    def end(self) -> None:
        """The request was cancelled: its reader comes to an end."""
        self._open.clear()
        self._chunks.clear()
        if not self.admission.done():
            self.admission.set_exception(InvalidRequest("Invalid request: it was cancelled"))
            self.admission.exception()
        self.wake()


class EmbeddingAnswer:
    """The one answer to an embedding request. Belongs to one event loop."""

    is_overrun = False
    """Nobody need keep up with one message."""

    def __init__(self, request: EmbedRequest) -> None:
        loop = asyncio.get_running_loop()
        self.request = request
        self.admission: asyncio.Future[Admitted] = loop.create_future()
        self.result: asyncio.Future[Embedded] = loop.create_future()
        self.was_refused = False
        """Whether the engine ended it before it ran."""

    @property
    def is_open(self) -> bool:
        """Whether the answer is still to come."""
        return not self.result.done()

    @property
    def was_computed(self) -> bool:
        return self.result.done() and self.result.exception() is None

    def fail(self, error: EngineError) -> None:
        """The request died."""
        for future in (self.admission, self.result):
            if not future.done():
                future.set_exception(error)
                future.exception()  # taken note of: the waiter may be gone

    def end(self) -> None:
        """The request was cancelled."""
        self.fail(InvalidRequest("Invalid request: it was cancelled"))


def _settle(stream: TokenStream | EmbeddingAnswer, message: ToServer) -> None:
    """Hand over what is no chunk."""
    match message:
        case Admitted(choice=0) if not stream.admission.done():
            stream.admission.set_result(message)
        case Embedded() if isinstance(stream, EmbeddingAnswer) and stream.is_open:
            stream.result.set_result(message)
        case Failed():
            stream.was_refused = not stream.admission.done()
            stream.fail(message.to_error())


class StreamTable:
    """All requests that are not over, by id."""

    def __init__(self) -> None:
        self._streams: dict[str, TokenStream | EmbeddingAnswer] = {}
        self._pace = ReadingPace()
        self._num_of: defaultdict[type, Counter[str]] = defaultdict(Counter)  # by kind of request and client

    def __len__(self) -> int:
        return len(self._streams)

    def open(self, request: GenerateRequest) -> TokenStream:
        """Raises: `InvalidRequest` when the id is in use."""
        self._check_unused(request.request_id)
        stream = TokenStream(request)
        self._add(stream)
        return stream

    def open_embedding(self, request: EmbedRequest) -> EmbeddingAnswer:
        """Raises: `InvalidRequest` when the id is in use."""
        self._check_unused(request.request_id)
        answer = EmbeddingAnswer(request)
        self._add(answer)
        return answer

    def num_like(self, request: GenerateRequest | EmbedRequest) -> tuple[int, int]:
        """How many are of its kind, and how many of those are its client's."""
        counts = self._num_of[type(request)]
        return counts.total(), counts[request.client]

    def _add(self, stream: TokenStream | EmbeddingAnswer) -> None:
        self._streams[stream.request.request_id] = stream
        self._num_of[type(stream.request)][stream.request.client] += 1

    def _pop(self, request_id: str) -> TokenStream | EmbeddingAnswer | None:
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            counts, client = self._num_of[type(stream.request)], stream.request.client
            counts[client] -= 1
            if not counts[client]:
                del counts[client]
        return stream

    def _check_unused(self, request_id: str) -> None:
        if request_id in self._streams:
            raise InvalidRequest(f"Invalid request: the request id {request_id!r} is in use")

    def requests(self, request_ids: Iterable[str]) -> list[GenerateRequest | EmbedRequest]:
        """Those of these ids that are not over."""
        return [self._streams[i].request for i in request_ids if i in self._streams]

    def dispatch(self, messages: Iterable[ToServer]) -> list[TokenStream | EmbeddingAnswer]:
        """Hand messages to their streams; those of requests that are over are dropped.

        Returns the streams that came to their end.
        """
        ended: list[TokenStream | EmbeddingAnswer] = []
        growing: dict[TokenStream, None] = {}
        for message in messages:
            stream = self._streams.get(getattr(message, "request_id", ""))
            if stream is None:
                continue
            if type(message) is TokenChunk and type(stream) is TokenStream:  # nearly always
                is_open = stream.push(message)
                growing[stream] = None
            else:
                _settle(stream, message)
                is_open = stream.is_open
            if not is_open:
                self._pop(message.request_id)
                ended.append(stream)
                if type(stream) is TokenStream:
                    growing.pop(stream, None)
                    stream.wake()  # the end waits for nothing
        self._pace.chunks_arrived(growing, len(self._streams))
        return ended

    def cancel(self, request_id: str) -> TokenStream | EmbeddingAnswer | None:
        """End a stream, and return it if it was there."""
        stream = self._pop(request_id)
        if stream is not None:
            stream.end()
        return stream

    def cancel_choice(self, request_id: str, choice: int) -> TokenStream | None:
        """End one choice, and return its request if it was there: with its last choice, that ends too."""
        stream = self._streams.get(request_id)
        if not isinstance(stream, TokenStream):
            return None
        stream.end_choice(choice)
        if not stream.is_open:
            self._pop(request_id)
        return stream

    def fail_all(self, error: EngineError) -> None:
        """Every request dies of `error`."""
        streams, self._streams = self._streams, {}
        self._num_of.clear()
        for stream in streams.values():
            stream.fail(error)
