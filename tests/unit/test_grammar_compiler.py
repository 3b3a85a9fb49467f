"""The engine's side of compiling constraints, with helpers that fail in every way a process can."""

from __future__ import annotations

import contextlib
import json
import random
import select
import sys
import threading
import time
from collections import deque
from types import SimpleNamespace

import msgspec
import psutil
import pytest

from engine.config.model_location import bundled_model
from engine.core.constraints import ConstrainedRequests
from engine.core.messages import GenerateRequest
from engine.errors import InternalError, InvalidRequest
from engine.grammar import compiler as module
from engine.grammar.compiler import CompiledGrammar, GrammarCompiler
from engine.grammar.helper import _Helper
from engine.grammar.protocol import Job
from engine.sampling.constraint import MAX_CONSTRAINT_CHARS, Constraint
from engine.sampling.params import SamplingParams

READS = "from multiprocessing.connection import Connection; c = Connection(int(sys.argv[1]));"
HELPERS = {
    "is stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "reads and says nothing": READS + "[c.recv_bytes() for _ in iter(int, 1)]",
    "exits": "sys.exit(3)",
    "exits once it is asked": READS + "c.recv_bytes()",
    "hangs up and stays": "os.close(int(sys.argv[1])); time.sleep(600)",
    "talks nonsense": READS + "c.send_bytes(b'nonsense'); time.sleep(600)",
}


@pytest.mark.parametrize("text", ["[a-z]+", "a" * MAX_CONSTRAINT_CHARS], ids=["small", "large"])
@pytest.mark.parametrize("how", HELPERS)
def test_a_helper_that_fails_fails_its_constraints_only(
    how: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is answered, however much the helper leaves unread; and so are those that come later."""
    monkeypatch.setattr(module, "_SILENCE_S", 0.5)
    program = f"import os, signal, sys, time; {HELPERS[how]}"
    compiler = GrammarCompiler("", 100, timeout_s=0.1, helper_command=(sys.executable, "-c", program))
    with contextlib.closing(compiler):
        for number in range(2):
            constraints = [Constraint("regex", f"{i}{number}{text[2:]}") for i in range(3)]
            for constraint in constraints:
                compiler.start(constraint)
            results = {}
            while len(results) < 3:
                assert select.select([compiler.wake_fd], [], [], 60)[0], "somebody waits for ever"
                results |= compiler.take_results()
            assert set(results) == {constraint.key for constraint in constraints}
            assert all(isinstance(result, InternalError) for result in results.values())
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            assert program not in child.cmdline()


def test_a_grammar_that_is_compiled_twice_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody left when it was compiled already, and came back before anybody had heard of that."""
    compiler = GrammarCompiler(str(bundled_model()), 4096, timeout_s=60)
    constraint, kept, keep = Constraint("regex", "[a-z]+"), [], compiler._keep
    monkeypatch.setattr(compiler, "_keep", lambda *found: (kept.append(found), keep(*found)))
    with contextlib.closing(compiler):
        compiler.start(constraint)
        assert select.select([compiler.wake_fd], [], [], 60)[0]
        compiler.forget(constraint)
        compiler.start(constraint)
        while len(kept) < 2:
            assert select.select([compiler.wake_fd], [], [], 60)[0]
            compiler.take_results()
        grammar = compiler.find(constraint)
        assert grammar is not None
        assert compiler._num_cached_bytes == grammar.num_bytes + len(constraint.text)


def test_a_wrong_constraint_of_several_names_is_named_as_each_request_does() -> None:
    """They wait for the same compilation."""
    compiler = GrammarCompiler(str(bundled_model()), 4096, timeout_s=60)
    names = {"first": "regex", "second": "structured_outputs.regex", "third": "guided_regex"}
    with contextlib.closing(ConstrainedRequests(compiler, max_waiting=3)) as requests:
        for request_id, param in names.items():
            params = SamplingParams(constraint=Constraint("regex", "(a", param))
            requests.hold(GenerateRequest(request_id, b"", params))
        answered = []
        while not answered:
            assert select.select([requests.wake_fd], [], [], 60)[0]
            answered = list(requests.take_ready())
    assert [request.request_id for request, *_ in answered] == list(names)
    for request, error, _ in answered:
        assert isinstance(error, InvalidRequest)
        assert error.param == names[request.request_id]
        assert error.message.startswith(f"Invalid request: {error.param} cannot be compiled")


def test_a_helper_that_cannot_be_started_fails_its_constraints() -> None:
    compiler = GrammarCompiler("", 100, timeout_s=0.1, helper_command=("/there is no such program",))
    with contextlib.closing(compiler):
        for number in range(2):
            constraint = Constraint("regex", f"{number}")
            compiler.start(constraint)
            assert select.select([compiler.wake_fd], [], [], 60)[0], "somebody waits for ever"
            (result,) = compiler.take_results().values()
            assert isinstance(result, InternalError)


def test_what_cannot_be_said_to_the_helper_fails_alone() -> None:
    """No constraint that is made holds half of a character; if one did, nobody would wait for ever."""
    compiler = GrammarCompiler(str(bundled_model()), 4096, timeout_s=60)
    unsayable, good = Constraint("regex", "x"), Constraint("regex", "[a-z]+")
    msgspec.structs.force_setattr(unsayable, "text", "\ud800")
    with contextlib.closing(compiler):
        for constraint, kind in ((unsayable, InternalError), (good, CompiledGrammar)):
            compiler.start(constraint)
            assert select.select([compiler.wake_fd], [], [], 60)[0], "somebody waits for ever"
            (result,) = compiler.take_results().values()
            assert isinstance(result, kind)


def results_of(compiler: GrammarCompiler, num_results: int) -> dict[Constraint, object]:
    """The next results, in the order in which they come."""
    found: dict = {}
    while len(found) < num_results:
        assert select.select([compiler.wake_fd], [], [], 60)[0], "somebody waits for ever"
        found |= compiler.take_results()
    return found


def test_quick_ones_are_made_while_slow_ones_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a slow one that nobody waits for any more is not made."""
    draw = random.Random(0)
    lists = [[f"{draw.random()} {i}" for i in range(4000)] for _ in range(3)]
    slow = [Constraint("choice", json.dumps(words)) for words in lists]
    gate, made, compile_it = threading.Event(), [], module._compiled

    def gated(workshop, compiler, constraint, passed):
        if constraint in slow:
            assert gate.wait(60)
        made.append(constraint)
        return compile_it(workshop, compiler, constraint, passed)

    monkeypatch.setattr(module, "_compiled", gated)
    compiler = GrammarCompiler(str(bundled_model()), 4096, timeout_s=60)
    with contextlib.closing(compiler):
        for constraint in slow:
            compiler.start(constraint)
        for number in range(3):
            quick = Constraint("regex", f"quick {number}")
            compiler.start(quick)
            assert list(results_of(compiler, 1)) == [quick.key] and made[-1] == quick
        deadline = time.monotonic() + 60
        while len(compiler._worker._passed) < 2:
            assert time.monotonic() < deadline, "the others have passed, too"
            time.sleep(0.01)
        last = list(compiler._worker._passed.values())[-1]
        compiler.forget(last)
        deadline = time.monotonic() + 60
        while last in compiler._worker._passed.values():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        gate.set()
        assert len(results_of(compiler, 2)) == 2
    assert last not in made and len(made) == 5


def test_a_short_one_does_not_wait_for_long_ones_to_be_tried() -> None:
    """A dozen of which would each run into the limit."""
    branches = "|".join(["a*"] * 2000)
    compiler = GrammarCompiler(str(bundled_model()), 4096, timeout_s=60)
    with contextlib.closing(compiler):
        compiler.start(Constraint("regex", "warm"))
        results_of(compiler, 1)
        for number in range(12):
            compiler.start(Constraint("regex", f"({branches})*b{number}"))
        quick = Constraint("regex", "quick")
        compiler.start(quick)
        ((key, grammar),) = results_of(compiler, 1).items()
    assert key == quick.key and isinstance(grammar, CompiledGrammar)


def test_a_long_one_waits_for_no_short_ones_that_came_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, while a slow one has its place."""
    texts = ["slow " * 1000, "short", "short", "long " * 1000, *["later"] * 50]
    jobs = [Job(number, Constraint("regex", text)) for number, text in enumerate(texts)]
    waiting, running = object.__new__(_Helper), {}
    waiting._waiting, waiting._slow, waiting._trials = deque(jobs), deque(), running

    def begin(self: _Helper, job: Job, *, is_slow: bool, is_beside: bool = False) -> None:
        running[job.number] = SimpleNamespace(job=job, is_slow=is_slow, is_beside=is_beside)

    monkeypatch.setattr(_Helper, "_begin", begin)
    waiting._begin_trials()
    assert list(running) == [0, 1, 2], "the second short one beside"
    for ended in (2, 4, 5):  # always the one beside
        del running[ended]
        waiting._begin_trials()
    assert list(running) == [0, 1, 6]
    del running[1]
    waiting._begin_trials()
    assert list(running) == [0, 6, 3]
    del running[0], running[6]
    waiting._begin_trials()
    assert list(running) == [3, 7, 8], "all three places are taken again"
