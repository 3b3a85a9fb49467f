"""The engine in a process of its own: started, talked to, watched, restarted, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

import engine
from engine.config.engine_config import EngineConfig
from engine.core.client import EngineState
from engine.core.frames import HEADER, FrameError, FrameReader, encode_frame
from engine.core.messages import (
    CacheFlushed,
    CancelChoice,
    CancelRequest,
    EngineFailed,
    EngineReady,
    EngineStats,
    FlushCache,
    GenerateRequest,
    Progress,
    Shutdown,
    StatsRequest,
    ToEngine,
    ToServer,
)
from engine.core.streams import StreamTable, TokenStream
from engine.errors import ConfigError, EngineError, InvalidRequest, Overloaded
from engine.scheduling.admission import check_prompt_len

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

ENGINE_COMMAND = (sys.executable, "-m", "engine.core.engine_process")
_READ_BYTES = 1 << 20
_ONE_THREAD = {
    name: "1"
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
}
"""The engine's kernels bring their own threads; the pools of libraries would fight with them."""


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long to wait for what. Seconds.

    A death after less than `stable_s` of service counts as a repeated failure; the n-th restart in
    a row waits `first_delay_s * 2**(n-1)`, at most `longest_delay_s`; after `max_failures` of them
    there is no further one. An engine that is asked every `pulse_s` and does not answer for
    `silence_s`, which no step takes, is stuck and gets killed.
    """

    first_delay_s: float = 0.1
    longest_delay_s: float = 30.0
    stable_s: float = 60.0
    max_failures: int = 6
    shutdown_s: float = 5.0
    terminate_s: float = 2.0
    pulse_s: float = 10.0
    silence_s: float = 300.0


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
        self._config = config
        self._command = tuple(command)
        self._patience = patience or Patience()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._outbox = bytearray()
        self._flush_is_due = False
        self._streams = StreamTable()
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
        return None if self._process is None else self._process.pid

    # --- the EngineClient protocol

    async def submit(self, request: GenerateRequest) -> TokenStream:
        if self.state is not EngineState.READY:
            raise self._unavailable()
        assert self.info is not None
        check_prompt_len(len(request.prompt) // 4, self.info.context_length)  # frames are bounded
        if len(self._streams) >= self.info.num_places:  # the engine would say so too, unless it is stuck
            raise Overloaded("The request queue is full.", slug="queue_full")
        stream = self._streams.open(request)
        try:
            self._send(request)
            await stream.admission
        except FrameError as error:
            self._streams.cancel(request.request_id)
            raise InvalidRequest(f"Invalid request: {error}") from None
        except asyncio.CancelledError:
            self.cancel(request.request_id)
            raise
        return stream

    def cancel(self, request_id: str) -> None:
        if self._streams.cancel(request_id):
            self._send(CancelRequest(request_id))

    def cancel_choice(self, request_id: str, choice: int) -> None:
        if self._streams.cancel_choice(request_id, choice):
            self._send(CancelChoice(request_id, choice))

    async def stats(self) -> EngineStats:
        """Raises: `Overloaded` when the engine is not there to answer."""
        return await self._ask(StatsRequest(), EngineStats)

    async def flush(self) -> bool:
        """Raises: `Overloaded` when the engine is not there to answer."""
        return (await self._ask(FlushCache(), CacheFlushed)).was_idle

    async def close(self) -> None:
        """Shut the engine down: ask, then terminate, then kill. Nothing of it is left afterwards."""
        if not self._is_closing:
            self._is_closing = True
            was_ready = self.state is EngineState.READY
            self._set_state(EngineState.DRAINING, "the engine is shutting down")
            if was_ready:
                self._send(Shutdown())
                self._flush()
            elif self._process is not None:
                self._process.terminate()  # while it loads, it reads no messages
        if self._process is not None:
            await self._reap(self._patience.shutdown_s)
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        self._disconnect()
        self._fail_requests(Overloaded("The engine is shutting down.", slug="shutting_down"))

    # --- start

    def start(self) -> None:
        """Launch the engine's process. Raises: `OSError` when the machine cannot.

        Effects: one child process, dead at the latest with this thread.
        """
        ours, theirs = socket.socketpair()
        package_root = str(Path(engine.__file__).parent.parent)
        search_path = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = (
            os.environ
            | _ONE_THREAD
            | {
                "PYTHONPATH": os.pathsep.join(search_path),
                "TOKENIZERS_PARALLELISM": "false",
            }
        )
        level = logging.getLevelName(logging.getLogger("engine").getEffectiveLevel()).lower()
        with theirs:
            self._process = subprocess.Popen(
                [*self._command, str(theirs.fileno()), str(os.getpid()), level],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # a ctrl-C at the terminal is the server's to handle
            )
        self._socket = ours
        body = msgspec.msgpack.encode(self._config)
        with contextlib.suppress(ConnectionError):  # it is dead already, as whoever reads will see
            ours.sendall(HEADER.pack(len(body)) + body)

    def attach(self) -> None:
        """Begin to talk with the engine and to watch it, in the running event loop."""
        if self._supervisor is None:
            if self._process is None:
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
            delay_s = self._patience.first_delay_s * 2 ** (num_failures - 1)
            await asyncio.sleep(min(delay_s, self._patience.longest_delay_s))
            if self._is_closing:
                return

    async def _live_once(self) -> str:
        """The life of one process, started if none is; how it ended, for a sentence."""
        if self._socket is None:
            try:
                self.start()
            except OSError as error:
                return f"could not be started ({error.strerror})"
        watch = asyncio.create_task(self._watch())
        try:
            await self._talk()
        except Exception:
            logger.exception("the connection to the engine failed")
        finally:
            watch.cancel()
        self._disconnect()
        return await self._reap(self._patience.terminate_s)

    async def _talk(self) -> None:
        """Handle what the engine says, until it is gone."""
        assert self._socket is not None
        connection, self._socket = self._socket, None
        connection.setblocking(False)
        reader, self._writer = await asyncio.open_connection(sock=connection)
        frames = FrameReader(ToServer)
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(_READ_BYTES):
                try:
                    messages = frames.feed(data)
                except FrameError as error:
                    logger.error("the engine talks nonsense: %s", error)
                    return
                self._streams.dispatch(messages)
                for message in messages:
                    self._handle(message)

    async def _watch(self) -> None:
        """Kill an engine that is alive and does nothing: its requests would wait for ever."""
        while True:
            await asyncio.sleep(self._patience.pulse_s)
            if self.state is not EngineState.READY:
                continue
            try:
                await asyncio.wait_for(self.stats(), self._patience.silence_s)
            except Overloaded:
                return
            except TimeoutError:
                logger.error("the engine has not answered for %g s and is killed", self._patience.silence_s)
                assert self._process is not None
                self._process.kill()
                return

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
            case EngineStats() | CacheFlushed() if waiters := self._waiters[type(message)]:
                waiter = waiters.popleft()
                if not waiter.done():
                    waiter.set_result(message)
            case Progress() if self.state in (EngineState.LOADING, EngineState.RESTARTING):
                self.state_reason = f"{message.stage}, {message.fraction:.0%}"

    async def _reap(self, patience_s: float) -> str:
        """Wait until the process is gone, with more and more force; how it went, for a sentence."""
        process = self._process
        assert process is not None
        for force, wait_s in ((None, patience_s), (process.terminate, self._patience.terminate_s)):
            if force is not None:
                force()
            deadline = time.monotonic() + wait_s
            while process.poll() is None and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
        if process.poll() is None:
            process.kill()
            process.wait()
        code = process.returncode
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"

    def _disconnect(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._outbox.clear()

    def _fail_requests(self, error: EngineError) -> None:
        self._streams.fail_all(error)
        waiters, self._waiters = self._waiters, defaultdict(deque)
        for waiter in itertools.chain(*waiters.values()):
            if not waiter.done():
                waiter.set_exception(error)

    # --- sending

    async def _ask(self, question: ToEngine, answer: type[Answer]) -> Answer:
        """Raises: `Overloaded` when the engine is not there to answer."""
        if self.state is not EngineState.READY:
            raise self._unavailable()
        waiter: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiters[answer].append(waiter)
        self._send(question)
        return await waiter

    def _send(self, message: ToEngine) -> None:
        """Queue a message; all of one turn of the loop go out together.

        Raises: `FrameError` for one that does not encode; the others are not harmed.
        """
        if self._writer is None:
            return
        self._outbox += encode_frame([message])
        if not self._flush_is_due:
            self._flush_is_due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_is_due = False
        if self._outbox and self._writer is not None:
            self._writer.write(bytes(self._outbox))
            self._outbox.clear()

    def _set_state(self, state: EngineState, reason: str) -> None:
        self.state, self.state_reason = state, reason
        self._state_changed.set()

    def _unavailable(self) -> Overloaded:
        slugs = {EngineState.LOADING: "model_loading", EngineState.DRAINING: "shutting_down"}
        return Overloaded(self.state_reason, slug=slugs.get(self.state, "engine_restarted"))
