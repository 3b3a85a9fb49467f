"""The client of an engine in a process of its own, which it starts, watches, restarts and stops."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

from engine.config.engine_config import EngineConfig
from engine.core.client import EngineState
from engine.core.connection import EngineConnection
from engine.core.drain_rate import DrainRate
from engine.core.engine_child import ENGINE_COMMAND, EngineChild
from engine.core.frames import FrameError
from engine.core.messages import (
    AdapterLoaded,
    CacheFlushed,
    CancelChoice,
    CancelRequest,
    DumpState,
    Embedded,
    EmbedRequest,
    EngineFailed,
    EngineReady,
    EngineStats,
    FlushCache,
    GenerateRequest,
    LoadAdapter,
    Progress,
    Shutdown,
    StateDump,
    StatsRequest,
    ToEngine,
    TokenChunk,
    ToServer,
    UnloadAdapter,
    UnpinAdapter,
)
from engine.core.streams import EmbeddingAnswer, StreamTable, TokenStream
from engine.core.suspects import Suspects
from engine.core.watchdog import Watchdog
from engine.errors import ConfigError, EngineError, InvalidRequest, Overloaded
from engine.scheduling.admission import check_prompt_len

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

_LAST_WORDS_S = 0.2
"""How long a dead engine's messages are read on."""


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long to wait for what. Seconds.

    A death after less than `stable_s` of service counts as a repeated failure; the n-th restart in
    a row waits `first_delay_s * 2**(n-1)`, at most `longest_delay_s`; after `max_failures` of them
    there is no further one. The engine is looked at every `pulse_s`; while it loads, `load_s` without
    a sign of it are too many (afterwards, or if somebody stopped it, `EngineConfig.watchdog_timeout`).
    """

    first_delay_s: float = 0.1
    longest_delay_s: float = 30.0
    stable_s: float = 60.0
    max_failures: int = 6
    shutdown_s: float = 5.0
    terminate_s: float = 2.0
    pulse_s: float = 0.5
    load_s: float = 600.0


class ProcessClient:
    """Implements `EngineClient` with an engine in a child process, and supervises that.

    `start` launches the process and needs no event loop, so that it loads while the caller imports;
    `attach` is called once inside the loop, and from then on messages flow. When the engine dies,
    every request in flight fails with `Overloaded` (engine_restarted) and a new one is started.
    The process dies with the thread that started it: the kernel sees to that.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        command: Sequence[str] = ENGINE_COMMAND,
        patience: Patience | None = None,
    ) -> None:
        self.state = EngineState.LOADING
        self.state_reason = "the engine is starting"
        self.info: EngineReady | None = None
        self.num_restarts = 0
        self._config = config
        self._command = tuple(command)
        self._patience = patience or Patience()
        self._child: EngineChild | None = None
        self._is_met = False  # whether somebody has begun to talk with the child
        self._connection = EngineConnection()
        self._streams = StreamTable()
        self._drain_rate = DrainRate()
        self._suspects = Suspects()
        self._waiters: defaultdict[type, deque[asyncio.Future[Any]]] = defaultdict(deque)
        """Who waits for an answer of which type; the engine answers in order."""
        self._state_changed = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None
        self._start_error: EngineFailed | None = None
        self._ready_since_s: float | None = None
        self._is_closing = False

    @property
    def pid(self) -> int | None:
        """Process id of the engine that runs now."""
        return None if self._child is None else self._child.pid

    # --- the EngineClient protocol

    async def submit(self, request: GenerateRequest) -> TokenStream:
        info = self._require_place(request)
        check_prompt_len(len(request.prompt) // 4, info.context_length)  # frames are bounded
        request = self._suspects.check(request)
        stream = self._streams.open(request)
        await self._admission(stream)
        return stream

    @property
    def retry_after_s(self) -> float:
        num_running = 0 if self.info is None else self.info.max_running_requests
        return self._drain_rate.wait_s(max(0, len(self._streams) - num_running))

    def _is_full(self, request: GenerateRequest | EmbedRequest, num_places: int) -> bool:
        """Whether the engine would refuse a request, or, being stuck, never say so.

        With several clients it is asked, because it may prefer one client's request to another's.
        """
        num_streams, num_own = self._streams.num_like(request)
        return num_streams >= (num_places if num_own == num_streams else 2 * num_places)

    def _with_advice(self, error: Overloaded) -> Overloaded:
        if error.slug == "queue_full":
            error.retry_after_s = self.retry_after_s
        return error

    async def embed(self, request: EmbedRequest) -> Awaitable[Embedded]:
        self._require_place(request)
        request = self._suspects.check(request)
        answer = self._streams.open_embedding(request)
        await self._admission(answer)
        return answer.result

    async def _admission(self, stream: TokenStream | EmbeddingAnswer) -> None:
        """Send a request and wait until it runs."""
        request = stream.request
        self._drain_rate.note_begin()
        try:
            self._connection.send(request)
            await stream.admission
        except FrameError as error:
            self._streams.cancel(request.request_id)
            raise InvalidRequest(f"Invalid request: {error}") from None
        except asyncio.CancelledError:
            self.cancel(request.request_id)
            raise
        except Overloaded as error:
            raise self._with_advice(error) from None

    def _require_place(self, request: GenerateRequest | EmbedRequest) -> EngineReady:
        """Raises: `Overloaded` when no request can be taken."""
        if self.state is not EngineState.READY:
            raise self._unavailable()
        assert self.info is not None
        if self._is_full(request, self.info.num_places):
            raise self._with_advice(Overloaded("The request queue is full.", slug="queue_full"))
        return self.info

    def cancel(self, request_id: str) -> None:
        stream = self._streams.cancel(request_id)
        if stream is not None:
            self._note_end(stream)
            self._connection.send(CancelRequest(request_id))

    def cancel_choice(self, request_id: str, choice: int) -> None:
        stream = self._streams.cancel_choice(request_id, choice)
        if stream is not None:
            self._connection.send(CancelChoice(request_id, choice))
            if not stream.is_open:
                self._note_end(stream)

    def _note_end(self, stream: TokenStream | EmbeddingAnswer) -> None:
        """It came to its end, be it by its client's wish."""
        if stream.was_computed:
            self._suspects.note_end(stream.request)
        if not stream.was_refused:  # that gave nobody a place
            self._drain_rate.note_end()
        if not len(self._streams):
            self._drain_rate.note_idle()

    async def stats(self) -> EngineStats:
        """Raises: `Overloaded` when the engine is not there to answer."""
        return await self._ask(StatsRequest(), EngineStats)

    async def flush(self) -> bool:
        """Raises: `Overloaded` when the engine is not there to answer."""
        return (await self._ask(FlushCache(), CacheFlushed)).was_idle

    async def load_adapter(self, directory: str, is_pinned: bool = False) -> AdapterLoaded:
        """Raises: `Overloaded` when the engine is not there to answer."""
        return await self._ask(LoadAdapter(directory, is_pinned), AdapterLoaded)

    def unload_adapter(self, digest: str) -> None:
        self._connection.send(UnloadAdapter(digest))

    def unpin_adapter(self, digest: str) -> None:
        self._connection.send(UnpinAdapter(digest))

    async def dump_state(self) -> bytes:
        """Raises: `Overloaded` when the engine is not there to answer."""
        return (await self._ask(DumpState(), StateDump)).state

    async def close(self, *, at_once: bool = False) -> None:
        """Shut the engine down: ask, unless it is to be `at_once`, then kill. Nothing of it is left."""
        if not self._is_closing:
            self._is_closing = True
            was_ready = self.state is EngineState.READY
            self._set_state(EngineState.DRAINING, "the engine is shutting down")
            if was_ready and not at_once:
                self._connection.send(Shutdown())
                self._connection.flush()
            elif self._child is not None:
                self._child.kill()  # while it loads, it reads no messages
        child = self._child
        if child is not None:
            await child.reap(self._patience.shutdown_s)
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        self._connection.close()
        self._fail_requests(Overloaded("The engine is shutting down.", slug="shutting_down"))
        if child is not None:
            child.close()

    # --- start

    def start(self) -> None:
        """Launch the engine's process. Raises: `OSError` when the machine cannot.

        Effects: one child process, dead at the latest with this thread.
        """
        child = EngineChild(self._config, self._command)
        if self._child is not None:
            self._child.close()
        self._child, self._is_met = child, False

    def attach(self) -> None:
        """Begin to talk with the engine and to watch it, in the running event loop."""
        if self._supervisor is None:
            if self._child is None:
                self.start()
            self._supervisor = asyncio.create_task(self._supervise())

    async def wait_ready(self) -> None:
        """Raises: `ConfigError` with the engine's own line when it cannot start."""
        self.attach()
        while self.state is not EngineState.READY:
            if self.state in (EngineState.FAILED, EngineState.DRAINING):
                raise ConfigError(self.state_reason)
            self._state_changed.clear()
            await self._state_changed.wait()

    async def wait_failed(self) -> str:
        """Returns the reason when there will be no further restart."""
        while self.state is not EngineState.FAILED:
            self._state_changed.clear()
            await self._state_changed.wait()
        return self.state_reason

    # --- supervision

    async def _supervise(self) -> None:
        num_failures = 0
        while True:
            how = await self._live_once()
            if self._is_closing:
                return
            lived_s = 0.0 if self._ready_since_s is None else time.monotonic() - self._ready_since_s
            self._ready_since_s = None
            num_failures = 1 if lived_s >= self._patience.stable_s else num_failures + 1
            if self._start_error is not None:
                self._set_state(EngineState.FAILED, self._start_error.message)
            elif num_failures > self._patience.max_failures:
                self._set_state(EngineState.FAILED, f"the engine {how} {num_failures} times in a row")
            else:
                state = EngineState.LOADING if self.info is None else EngineState.RESTARTING
                self._set_state(state, f"the engine {how} and is being restarted")
            if self.info is not None or self._start_error is None:  # else whoever starts us reports it
                logger.error(self.state_reason)
            self._fail_requests(
                Overloaded("The engine was restarted; please try again.", slug="engine_restarted")
            )
            if self.state is EngineState.FAILED:
                return
            self.num_restarts += 1
            delay_s = self._patience.first_delay_s * 2 ** (num_failures - 1)
            await asyncio.sleep(min(delay_s, self._patience.longest_delay_s))
            if self._is_closing:
                return

    async def _live_once(self) -> str:
        """The life of one process, started if none is; how it ended, for a sentence."""
        if self._child is None or self._is_met:
            try:
                self.start()
            except OSError as error:
                return f"could not be started ({error.strerror})"
        child, self._is_met = self._child, True
        assert child is not None
        watchdog = Watchdog(child.board, self._ask_for_a_sign)
        talk, gone, stuck = tasks = [
            asyncio.create_task(self._talk(child)),
            asyncio.create_task(child.wait_gone()),
            asyncio.create_task(
                watchdog.wait_stuck(self._patience.pulse_s, lambda: self._allowed_silence_s(child))
            ),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():  # what it said last may still be unread, but others may hold its end open
                await asyncio.wait([talk], timeout=_LAST_WORDS_S)
        finally:
            for task in tasks:
                task.cancel()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                logger.error("the connection to the engine failed", exc_info=outcome)
        self._connection.close()
        if isinstance(outcomes[-1], float):
            child.kill()
        how = await child.reap(self._patience.terminate_s)
        self._suspects.note_death(self._streams.requests(child.suspects()))
        return f"made no progress for {outcomes[-1]:.3g} s" if isinstance(outcomes[-1], float) else how

    async def _talk(self, child: EngineChild) -> None:
        """Handle what the engine says, until it is gone."""
        async for messages in self._connection.receive(child.take_socket()):
            for stream in self._streams.dispatch(messages):
                if stream.is_overrun:
                    self._connection.send(CancelRequest(stream.request.request_id))
                self._note_end(stream)
            for message in messages:
                if type(message) is not TokenChunk:
                    self._handle(message)

    def _allowed_silence_s(self, child: EngineChild) -> float:
        is_loading = self.state is not EngineState.READY and not child.is_stopped
        return self._patience.load_s if is_loading else self._config.watchdog_timeout

    async def _ask_for_a_sign(self) -> None:
        """Give the engine something to do; it need not answer, the board shows whether it moves."""
        if self.state is EngineState.READY:
            with contextlib.suppress(Overloaded):
                await self.stats()

    def _handle(self, message: ToServer) -> None:
        """Messages that concern the engine itself; those of requests went to their streams."""
        match message:
            case EngineReady():
                self.info = message
                self._ready_since_s = time.monotonic()
                if not self._is_closing:
                    self._set_state(EngineState.READY, "")
            case EngineFailed():
                self._start_error = message
            case EngineStats() | StateDump() | CacheFlushed() | AdapterLoaded():
                waiters = self._waiters[type(message)]
                if waiters and not (waiter := waiters.popleft()).done():
                    waiter.set_result(message)
            case Progress() if self.state in (EngineState.LOADING, EngineState.RESTARTING):
                self.state_reason = f"{message.stage}, {message.fraction:.0%}"

    def _fail_requests(self, error: EngineError) -> None:
        self._streams.fail_all(error)
        self._drain_rate.note_idle()
        waiters, self._waiters = self._waiters, defaultdict(deque)
        for waiter in itertools.chain(*waiters.values()):
            if not waiter.done():
                waiter.set_exception(error)

    # --- questions, and what is told of the engine

    async def _ask(self, question: ToEngine, answer: type[Answer]) -> Answer:
        """Raises: `Overloaded` when the engine is not there to answer."""
        if self.state is not EngineState.READY:
            raise self._unavailable()
        waiter: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiters[answer].append(waiter)
        self._connection.send(question)
        return await waiter

    def _set_state(self, state: EngineState, reason: str) -> None:
        self.state, self.state_reason = state, reason
        self._state_changed.set()

    def _unavailable(self) -> Overloaded:
        slugs = {EngineState.LOADING: "model_loading", EngineState.DRAINING: "shutting_down"}
        return Overloaded(self.state_reason, slug=slugs.get(self.state, "engine_restarted"))
