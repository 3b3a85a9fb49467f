"""Compiled grammars for the engine: tried out in a helper process, made in a thread, kept in a cache.

A constraint comes from outside: its compilation may never end, eat all memory or overflow the
stack. So the helper process compiles it first, under limits. What passes comes back as a grammar in text,
and its masks are worked out once more here, in a thread whose native calls hold no interpreter lock,
because handing them over would cost more; docs/decisions has the figures.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import multiprocessing.connection
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import msgspec

import engine
from engine.errors import InternalError
from engine.grammar.bindings import load_bindings
from engine.grammar.compile import compile_prepared, make_tokenizer_info, strings_of
from engine.grammar.errors import GrammarError
from engine.grammar.known_paths import KnownPaths
from engine.grammar.protocol import Forget, HelperSettings, Job, Passed, Refusal, Verdict
from engine.grammar.string_masks import BoundsOfRules, StringTables
from engine.grammar.vocabulary import Vocabulary, VocabularyData
from engine.sampling.constraint import Constraint

logger = logging.getLogger(__name__)

Key = tuple[str, str]
Result: TypeAlias = "CompiledGrammar | GrammarError | InternalError"
"""`GrammarError` says what is wrong with the constraint, of which requests may have different names."""

MAX_CACHED = 1024
MAX_CACHED_BYTES = 256 * 2**20
_STACK_BYTES = 64 * 2**20
"""Of the thread: more than the helper has, where every constraint was tried."""
QUICK_S = 0.05
"""Time of a compilation that need not wait for slower ones: those are made one after the other beside it."""
_SILENCE_S = 10.0
"""Beside the time for each constraint that waits: the helper, and what it starts, need some of their own."""
_TOKENS = re.compile(r"Token\w*\(")
"""Where a grammar may name tokens, as the compiler prints it."""
_HELPER_COMMAND = (sys.executable, "-m", "engine.grammar.helper")


class CompiledGrammar:
    """A grammar for the matchers of any number of requests."""

    def __init__(
        self,
        bindings: Any,
        handle: Any,
        vocabulary: Vocabulary,
        paths: KnownPaths,
        strings: tuple[StringTables, BoundsOfRules] | None = None,
        largest: str = "",
    ) -> None:
        self.bindings, self.handle, self.vocabulary = bindings, handle, vocabulary
        self.paths, self.strings = paths, strings
        self.largest = largest
        """What there is most of in the constraint, for an answer that takes too much."""
        self.num_bytes: int = handle.memory_size_bytes()
        self.names_tokens = _TOKENS.search(handle.grammar().to_string()) is not None
        """Whether tokens stand in it by their ids, so that their text is not all there is to them."""


class GrammarCompiler:
    """Finds or makes compiled grammars. Its methods belong to the engine's thread, and never wait.

    A constraint that several requests ask for is compiled once. `wake_fd` becomes readable when
    `take_results` has something to give.
    """

    def __init__(
        self,
        tokenizer_path: str,
        vocab_size: int,
        *,
        timeout_s: float,
        free_whitespace: bool = False,
        helper_command: tuple[str, ...] = _HELPER_COMMAND,
    ) -> None:
        self._settings = HelperSettings(tokenizer_path, vocab_size, timeout_s, free_whitespace)
        self._command = helper_command
        self._cache: OrderedDict[Key, CompiledGrammar] = OrderedDict()
        self._num_cached_bytes = 0
        self._num_waiting: dict[Key, int] = {}
        self._worker: _Worker | None = None
        self._wake_reader, self._wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    @property
    def wake_fd(self) -> int:
        return self._wake_reader

    def find(self, constraint: Constraint) -> CompiledGrammar | None:
        """The grammar, if it is there already."""
        grammar = self._cache.get(constraint.key)
        if grammar is not None:
            self._cache.move_to_end(constraint.key)
        return grammar

    def warm_up(self) -> None:
        """Start the helper before it is needed: the first constraint would wait a second for it."""
        self._started_worker().warm_up()

    def start(self, constraint: Constraint) -> None:
        """Begin to compile, unless somebody waits for the same already; answered by `take_results`."""
        worker = self._started_worker()
        self._num_waiting[constraint.key] = self._num_waiting.get(constraint.key, 0) + 1
        if self._num_waiting[constraint.key] == 1:
            worker.submit(constraint)

    def forget(self, constraint: Constraint) -> None:
        """One of those who called `start` is gone; when it was the last, the compilation ends."""
        self._num_waiting[constraint.key] -= 1
        if not self._num_waiting[constraint.key]:
            del self._num_waiting[constraint.key]
            assert self._worker is not None
            self._worker.forget(constraint.key)

    def take_results(self) -> dict[Key, Result]:
        """What has been compiled, or refused, since the last call."""
        if self._worker is None:
            return {}
        try:
            os.read(self._wake_reader, 4096)
        except BlockingIOError:
            return {}
        results = {}
        for key, result in self._worker.take_results():
            if self._num_waiting.pop(key, None) is not None:
                results[key] = result
            if isinstance(result, CompiledGrammar):
                self._keep(key, result)
        return results

    def close(self) -> None:
        """Stop the helper and the thread; later calls start new ones."""
        if self._worker is not None:
            self._worker.stop()
            self._worker = None

    def __del__(self) -> None:
        self.close()
        os.close(self._wake_reader)
        os.close(self._wake_writer)

    def _started_worker(self) -> _Worker:
        if self._worker is None:
            self._worker = _Worker(self._command, self._settings, self._wake_writer)
            self._worker.start()
        return self._worker

    def _keep(self, key: Key, grammar: CompiledGrammar) -> None:
        if (before := self._cache.pop(key, None)) is not None:  # somebody left, and came back too early
            self._num_cached_bytes -= before.num_bytes + len(key[1])
        self._cache[key] = grammar
        self._num_cached_bytes += grammar.num_bytes + len(key[1])
        while len(self._cache) > MAX_CACHED or self._num_cached_bytes > MAX_CACHED_BYTES:
            oldest, dropped = self._cache.popitem(last=False)
            self._num_cached_bytes -= dropped.num_bytes + len(oldest[1])


class _Workshop(NamedTuple):
    """What a helper's vocabulary makes grammars with, in either of two threads."""

    bindings: Any
    compiler: Any
    slow_compiler: Any
    vocabulary: Vocabulary
    paths: KnownPaths
    strings: StringTables


class _Worker(threading.Thread):
    """Talks with the helper, restarts it, and compiles what it has passed, slow ones in a thread beside."""

    def __init__(self, command: tuple[str, ...], settings: HelperSettings, wake_writer: int) -> None:
        super().__init__(name="grammar", daemon=True)
        self._command, self._settings, self._wake_writer = command, settings, wake_writer
        self._inbox: deque[Constraint | Key | None] = deque()
        self._results: deque[tuple[Key, Result]] = deque()
        self._bell, self._ring = Pipe(duplex=False)
        self._numbers = itertools.count()
        self._jobs: dict[int, Constraint] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._helper: Connection | None = None
        self._silent_since_s = 0.0
        self._is_stopping = False
        self._workshop: _Workshop | None = None
        self._slow = ThreadPoolExecutor(1, "slow grammar")
        self._passed: dict[int, Constraint] = {}
        """Those that wait for the thread beside."""

    # --- called by the engine's thread

    def start(self) -> None:
        with _large_stacks():
            super().start()

    def warm_up(self) -> None:
        self._tell(None)

    def submit(self, constraint: Constraint) -> None:
        self._tell(constraint)

    def forget(self, key: Key) -> None:
        self._tell(key)

    def take_results(self) -> list[tuple[Key, Result]]:
        return [self._results.popleft() for _ in range(len(self._results))]

    def stop(self) -> None:
        self._is_stopping = True
        self._tell(None)
        self.join()

    def _tell(self, message: Constraint | Key | None) -> None:
        self._inbox.append(message)
        self._ring.send_bytes(b"")

    # --- the thread

    def run(self) -> None:
        try:
            while not self._is_stopping:
                sources = [self._bell] if self._helper is None else [self._bell, self._helper]
                ready = multiprocessing.connection.wait(sources, self._patience_s())
                if self._bell in ready:
                    self._bell.recv_bytes()
                    self._take(self._inbox.popleft())
                if self._helper is not None and self._helper in ready:
                    self._hear()
                elif self._jobs and self._patience_s() == 0:
                    logger.error("the grammar helper is stuck and is killed")
                    self._lose_helper()
        finally:
            self._kill_helper()
            self._slow.shutdown(cancel_futures=True)

    def _patience_s(self) -> float | None:
        """Seconds until a helper that says nothing is taken for stuck: it answers in time by itself."""
        if not self._jobs:
            return None
        limit_s = _SILENCE_S + self._settings.timeout_s * (1 + len(self._jobs))
        return max(0.0, self._silent_since_s + limit_s - time.monotonic())

    def _take(self, message: Constraint | Key | None) -> None:
        """A constraint to try, the key of one that nobody waits for any more, or None to warm up."""
        try:
            if isinstance(message, Constraint):
                if not self._jobs:
                    self._silent_since_s = time.monotonic()
                self._jobs[number := next(self._numbers)] = message  # fails with a helper that does not start
            if self._helper is None and not self._is_stopping and not isinstance(message, tuple):
                self._start_helper()
            if isinstance(message, Constraint):
                self._send(Job(number, message))
            elif message is not None:
                for number in [n for n, job in self._jobs.items() if job.key == message]:
                    del self._jobs[number]
                    self._send(Forget(number))
                for number in [n for n, job in list(self._passed.items()) if job.key == message]:
                    self._passed.pop(number, None)
        except (OSError, EOFError):
            self._lose_helper()
        except Exception:  # who waits here would do so for ever
            logger.exception("the grammar helper cannot be told of a constraint, and is killed")
            self._lose_helper()

    def _hear(self) -> None:
        """What the helper says, or that it is gone."""
        assert self._helper is not None
        self._silent_since_s = time.monotonic()
        try:
            self._heed(self._helper.recv_bytes())
        except (OSError, EOFError):
            self._lose_helper()
        except Exception:
            logger.exception("the grammar helper is of no use and is killed")
            self._lose_helper()

    def _heed(self, data: bytes) -> None:
        """One message of the helper: the vocabulary when it has started, then verdicts."""
        if self._workshop is None:
            self._workshop = _workshop(msgspec.msgpack.decode(data, type=VocabularyData))
            return
        verdict = msgspec.msgpack.decode(data, type=Verdict)
        constraint, result = self._jobs.pop(verdict.number, None), verdict.result
        if constraint is None:
            return
        if isinstance(result, Refusal):
            self._finish(constraint, GrammarError(result.text))
        elif result.compile_s <= QUICK_S:
            self._finish(constraint, _compiled(self._workshop, self._workshop.compiler, constraint, result))
        else:
            self._passed[verdict.number] = constraint
            with _large_stacks():
                self._slow.submit(self._finish_slow, self._workshop, verdict.number, result)

    def _finish_slow(self, workshop: _Workshop, number: int, result: Passed) -> None:
        """In the thread beside."""
        constraint = self._passed.pop(number, None)
        if constraint is not None:  # somebody waits for it still
            self._finish(constraint, _compiled(workshop, workshop.slow_compiler, constraint, result))

    def _finish(self, constraint: Constraint, result: Result) -> None:
        self._results.append((constraint.key, result))
        with contextlib.suppress(BlockingIOError):  # it has not heard of the others yet
            os.write(self._wake_writer, b"\0")

    # --- the helper

    def _start_helper(self) -> None:
        ours, theirs = Pipe()
        package_root = str(Path(engine.__file__).parent.parent)
        search_path = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        with theirs:
            self._process = subprocess.Popen(
                [
                    *self._command,
                    str(theirs.fileno()),
                    str(os.getpid()),
                    msgspec.json.encode(self._settings).decode(),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(search_path)},
            )
        patience_s = _SILENCE_S + 2 * self._settings.timeout_s
        with socket.socket(fileno=os.dup(ours.fileno())) as end:  # who is stopped reads nothing
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(patience_s))
        self._helper = ours
        self._workshop = None

    def _send(self, message: Job | Forget) -> None:
        if self._helper is not None:
            self._helper.send_bytes(msgspec.msgpack.encode(message))

    def _lose_helper(self) -> None:
        """The helper died or is stuck: its jobs fail, and the next one starts another."""
        self._kill_helper()
        jobs, self._jobs = self._jobs, {}
        for constraint in jobs.values():
            self._finish(constraint, InternalError("The grammar compiler died; please try again."))

    def _kill_helper(self) -> None:
        if self._helper is not None:
            self._helper.close()
            self._helper = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def _large_stacks() -> Iterator[None]:
    """For threads that begin within."""
    before = threading.stack_size(_STACK_BYTES)
    try:
        yield
    finally:
        threading.stack_size(before)


def _workshop(data: VocabularyData) -> _Workshop:
    bindings = load_bindings()
    info = make_tokenizer_info(bindings, data)
    compiler, slow_compiler = (bindings.GrammarCompiler(info, 1, False, -1) for _ in range(2))
    tables = StringTables(bindings, compiler, data.tokens)
    return _Workshop(bindings, compiler, slow_compiler, Vocabulary(data), KnownPaths(), tables)


def _compiled(workshop: _Workshop, compiler: Any, constraint: Constraint, passed: Passed) -> Result:
    try:
        handle = compile_prepared(compiler, passed.grammar)
        strings = strings_of(workshop.strings, handle, constraint)
        vocabulary, paths = workshop.vocabulary, workshop.paths
        return CompiledGrammar(workshop.bindings, handle, vocabulary, paths, strings, passed.largest)
    except Exception:
        logger.exception("a constraint passed in the helper and failed in the engine")
        return InternalError("The constraint could not be compiled.")


def _timeval(seconds: float) -> bytes:
    """As a socket's time-out is set."""
    return struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
