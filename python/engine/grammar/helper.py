"""The process that tries constraints out: `python -m engine.grammar.helper FD PARENT_PID SETTINGS`.

Started by `grammar.compiler`, never by hand. It sends the vocabulary once, then takes constraints and
says of each whether it compiles. Every constraint is compiled in a fork of its own, bounded in time and
memory: one that overflows the compiler's stack or does not come to an end takes nothing else with it.
"""

from __future__ import annotations

import multiprocessing.connection
import os
import resource
import signal
import sys
import tempfile
import time
from collections import deque
from multiprocessing.connection import Connection
from typing import IO

import msgspec

from engine.grammar.bindings import load_bindings
from engine.grammar.compile import compile_prepared, make_tokenizer_info, prepare, strings_of
from engine.grammar.errors import GrammarError, TakesTooMuch
from engine.grammar.largest import largest_in
from engine.grammar.protocol import Forget, HelperSettings, Job, Passed, Refusal, Verdict
from engine.grammar.string_masks import StringTables
from engine.grammar.trial import try_out
from engine.grammar.vocabulary import VocabularyData
from engine.parent_death import die_with_parent
from engine.sampling.constraint import Constraint
from engine.text.tokenizer import Tokenizer

MAX_TRIALS = 2
"""Constraints that are tried at once, beside a short one; the others wait for their turn."""
SHORT_CHARS = 4096
"""Of a constraint that is seldom slow: one of those need not wait for the others."""
TRIAL_BYTES = 2**30
"""Address space of a trial, beyond what the helper has itself."""
TRIAL_NICENESS = 5
"""Trials give way to the engine's kernels."""
QUICK_S = 0.25
"""Time of a trial after which it takes no turn from others any more: it goes on as the only slow one, or
begins again when it is its turn to be that."""


def main(argv: list[str]) -> int:
    die_with_parent(int(argv[1]))
    settings = msgspec.json.decode(argv[2], type=HelperSettings)
    data = VocabularyData.from_tokenizer(
        Tokenizer.from_checkpoint(settings.tokenizer_path), settings.vocab_size
    )
    with Connection(int(argv[0])) as connection:
        try:
            connection.send_bytes(msgspec.msgpack.encode(data))
            _Helper(connection, settings, data).serve()
        except (EOFError, ConnectionError):  # the engine is gone
            return 0
    return 0


class _Trial:
    """One fork: its job, its process, and where its answer comes from."""

    def __init__(
        self, job: Job, pid: int, answer: Connection, timeout_s: float, *, is_slow: bool, is_beside: bool
    ) -> None:
        self.job, self.pid, self.answer = job, pid, answer
        self.is_slow, self.is_beside = is_slow, is_beside
        self.turn_ends_s = time.monotonic() + QUICK_S
        self.deadline_s = time.monotonic() + timeout_s


class _Helper:
    def __init__(self, connection: Connection, settings: HelperSettings, data: VocabularyData) -> None:
        self._connection = connection
        self._settings = settings
        self._data = data
        self._bindings = load_bindings(without_torch=True)
        info = make_tokenizer_info(self._bindings, data)
        self._compiler = self._bindings.GrammarCompiler(info, 1, False, -1)
        self._strings = StringTables(self._bindings, self._compiler, data.tokens)
        self._waiting: deque[Job] = deque()
        self._slow: deque[Job] = deque()
        self._trials: dict[Connection, _Trial] = {}
        self._decoder = msgspec.msgpack.Decoder(Job | Forget)

    def serve(self) -> None:
        while True:
            self._begin_trials()
            ready = multiprocessing.connection.wait([self._connection, *self._trials], self._patience_s())
            for source in ready:
                if source is self._connection:
                    self._take(self._decoder.decode(self._connection.recv_bytes()))
                elif source in self._trials:
                    self._finish(self._trials[source])
            for trial in [t for t in self._trials.values() if t.deadline_s <= time.monotonic()]:
                self._stop(trial)
                limit = f"takes longer than {self._settings.timeout_s:g} s to compile"
                self._send(Verdict(trial.job.number, Refusal(limit, takes_too_much=True)), trial.job)
            if self._waiting:
                self._end_turns()

    def _begin_trials(self) -> None:
        beside = sum(trial.is_beside for trial in self._trials.values())
        while len(self._trials) - beside < MAX_TRIALS and (self._waiting or self._slow):
            has_slow = self._has_slow
            takes_slow = bool(self._slow) and not (self._waiting and has_slow)
            job = (self._slow if takes_slow else self._waiting).popleft()
            self._begin(job, is_slow=takes_slow and not has_slow)
        short = (job for job in self._waiting if len(job.constraint.text) <= SHORT_CHARS)
        if not beside and (job := next(short, None)) is not None:  # it takes no place from the others
            self._waiting.remove(job)
            self._begin(job, is_slow=False, is_beside=True)

    def _end_turns(self) -> None:
        """Somebody waits who may be quick: at most one of those that are not goes on."""
        for trial in list(self._trials.values()):
            if not trial.is_slow and trial.turn_ends_s <= time.monotonic():
                if self._has_slow:
                    self._stop(trial)
                    self._slow.append(trial.job)
                else:
                    trial.is_slow = True

    @property
    def _has_slow(self) -> bool:
        return any(trial.is_slow for trial in self._trials.values())

    def _patience_s(self) -> float | None:
        """Seconds until a trial has run too long, or its turn is over and others wait."""
        times_s = [trial.deadline_s for trial in self._trials.values()]
        if self._waiting:
            times_s += [trial.turn_ends_s for trial in self._trials.values() if not trial.is_slow]
        return max(0.0, min(times_s) - time.monotonic()) if times_s else None

    def _take(self, message: Job | Forget) -> None:
        if isinstance(message, Job):
            self._waiting.append(message)
            return
        for waiting in (self._waiting, self._slow):
            for job in [job for job in waiting if job.number == message.number]:
                waiting.remove(job)
        for trial in [t for t in self._trials.values() if t.job.number == message.number]:
            self._stop(trial)

    def _begin(self, job: Job, *, is_slow: bool, is_beside: bool = False) -> None:
        ours, theirs = multiprocessing.connection.Pipe(duplex=False)
        helper_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                die_with_parent(helper_pid)  # a fork does not inherit that
                theirs.send_bytes(msgspec.msgpack.encode(self._try(job.constraint)))
            finally:
                os._exit(0)
        theirs.close()
        self._trials[ours] = _Trial(
            job, pid, ours, self._settings.timeout_s, is_slow=is_slow, is_beside=is_beside
        )

    def _try(self, constraint: Constraint) -> Refusal | Passed:
        """In the fork."""
        os.nice(TRIAL_NICENESS)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        limit = _address_space_bytes() + TRIAL_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        settings = self._settings
        try:
            with tempfile.TemporaryFile() as log:
                os.dup2(log.fileno(), sys.stderr.fileno())
                prepared = prepare(self._bindings, constraint, settings.vocab_size, settings.free_whitespace)
                began_s = time.process_time()
                grammar = compile_prepared(self._compiler, prepared)
                compile_s = time.process_time() - began_s
                if (warning := _warning(log)) is not None:
                    return Refusal(warning)
                strings = strings_of(self._strings, grammar, constraint)
                try_out(self._bindings, grammar, self._data, strings)
                return Passed(prepared, largest_in(constraint.kind, constraint.text), compile_s)
        except GrammarError as error:
            return Refusal(str(error), isinstance(error, TakesTooMuch))
        except MemoryError:
            return Refusal("needs too much memory to compile", takes_too_much=True)
        except RecursionError:
            return Refusal("is nested too deeply", takes_too_much=True)

    def _finish(self, trial: _Trial) -> None:
        """The fork has answered, or died."""
        try:
            result = msgspec.msgpack.decode(trial.answer.recv_bytes(), type=Refusal | Passed)
        except EOFError:
            result = Refusal("is nested too deeply or too large for the compiler", takes_too_much=True)
        self._stop(trial)
        self._send(Verdict(trial.job.number, result), trial.job)

    def _stop(self, trial: _Trial) -> None:
        del self._trials[trial.answer]
        trial.answer.close()
        os.kill(trial.pid, signal.SIGKILL)  # until it is waited for, its id is nobody else's
        os.waitpid(trial.pid, 0)

    def _send(self, verdict: Verdict, job: Job) -> None:
        if isinstance(verdict.result, Refusal) and verdict.result.takes_too_much:
            verdict.result.text += f"; {largest_in(job.constraint.kind, job.constraint.text)}"
        self._connection.send_bytes(msgspec.msgpack.encode(verdict))


def _warning(log: IO[bytes]) -> str | None:
    """What the compiler warned of while it compiled: it has left something out."""
    log.seek(0)
    text = " ".join(log.read(4096).decode(errors="replace").split())
    return f"cannot be enforced: {text.split('Warning: ')[-1][:500]}" if text else None


def _address_space_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
