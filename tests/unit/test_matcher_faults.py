"""A matcher that fails, at every call it makes of its library: its own request fails, and nothing else."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from engine import LLM, SamplingParams
from engine.core import constraints
from engine.core.constraints import MATCHER_FAILED
from engine.core.messages import Failed, GenerateRequest, TokenChunk
from engine.errors import InternalError
from engine.grammar import guarded
from engine.grammar.known_paths import KnownPaths
from engine.sampling.constraint import Constraint, Thinking
from helpers.guessing import Oracle

CALLS = ["accept_token", "fill_next_token_bitmask", "find_jump_forward_string"]
PATTERN = "[a-f]{3}-middle-([g-k]{2}|xyz){9}-end"
VICTIM = Constraint("regex", PATTERN)
CONSTRAINTS = [
    None,
    Constraint("regex", PATTERN.replace("end", "ends")),
    Constraint("choice", '["The committee has decided to wait.", "No."]'),
    Constraint(
        "json_schema", '{"type": "array", "items": {"type": "string", "maxLength": 9}, "minItems": 3}'
    ),
]


class Faulty:
    """The matcher of the library, whose call number `nth` of `method` raises."""

    living: weakref.WeakSet[Faulty] = weakref.WeakSet()

    def __init__(self, handle: Any, method: str, nth: int, num_calls: list[int]) -> None:
        self._handle, self._method, self._nth, self._num_calls = handle, method, nth, num_calls
        self.living.add(self)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._handle, name)
        if name != self._method:
            return found

        def call(*args: Any) -> Any:
            self._num_calls[0] += 1
            if self._num_calls[0] == self._nth:
                raise RuntimeError("an injected fault")
            return found(*args)

        return call


class FaultyLibrary:
    """Stands in for the bindings of a compiled grammar. Without a `method`, it makes no matcher at all."""

    def __init__(self, bindings: Any, method: str | None, nth: int) -> None:
        self._bindings, self._method, self._nth, self._num_calls = bindings, method, nth, [0]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bindings, name)

    def GrammarMatcher(self, *args: Any) -> Faulty:
        if self._method is None:
            raise MemoryError("an injected fault")
        return Faulty(self._bindings.GrammarMatcher(*args), self._method, self._nth, self._num_calls)


@pytest.fixture(scope="module", params=["jumps", "steps", "guesses"])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    options = {"jumps": {}, "steps": {"disable_jump_forward": True}, "guesses": {"speculative": "ngram"}}
    with LLM(max_total_tokens=1024, debug_checks=True, **options[request.param]) as llm:
        yield llm


def params_of(constraint: Constraint | None, **fields: Any) -> SamplingParams:
    return SamplingParams(**{"seed": 3, "max_tokens": 40, "logprobs": 1} | fields, constraint=constraint)


def answers(llm: LLM, requests: dict[str, SamplingParams], n: int = 1) -> tuple[dict, dict[str, Failed]]:
    """Tokens, log-probabilities and the end of each choice, and what failed; checks the books."""
    core, prompt = llm._core, llm.tokenizer.encode("Answer: ")
    ids = b"".join(i.to_bytes(4, "little") for i in prompt)
    for name, params in requests.items():
        core.handle(GenerateRequest(name, ids, params, n))
    found: dict[tuple[str, int], tuple[list, list, list]] = {}
    failed: dict[str, Failed] = {}
    open_choices = {(name, choice) for name in requests for choice in range(n)}
    while open_choices or core.has_work:
        core.wait()
        for message in core.step():
            if isinstance(message, Failed):
                assert message.request_id not in failed, "a request fails once"
                failed[message.request_id] = message
                open_choices = {key for key in open_choices if key[0] != message.request_id}
            elif isinstance(message, TokenChunk):
                assert message.request_id not in failed, "nothing follows a failure"
                key = message.request_id, message.choice
                tokens, scores, ends = found.setdefault(key, ([], [], []))
                tokens += message.token_ids
                scores += message.logprobs or []
                if message.finish_reason is not None:
                    ends.append(message.finish_reason)
                    open_choices.discard(key)
    assert core.stats().num_blocks_in_use == 0
    return found, failed


def make_faulty(llm: LLM, method: str | None, nth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the grammar of `VICTIM` fails."""
    answers(llm, {"x": params_of(VICTIM, max_tokens=1)})
    grammar = llm._core._constrained.find(GenerateRequest("x", b"", params_of(VICTIM)))
    monkeypatch.setattr(grammar, "bindings", FaultyLibrary(grammar.bindings, method, nth))
    monkeypatch.setattr(grammar, "paths", KnownPaths())  # or the library might not be asked


def others() -> dict[str, SamplingParams]:
    return {f"other {i}": params_of(constraint, seed=i) for i, constraint in enumerate(CONSTRAINTS)}


@pytest.fixture(scope="module")
def alone(llm: LLM) -> dict:
    """Each of the others by itself."""
    found: dict = {}
    for name, params in others().items():
        found |= answers(llm, {name: params})[0]
    return found


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("nth", [1, 3, 9])
@pytest.mark.parametrize("method", CALLS)
def test_a_call_that_fails_fails_its_request(
    llm: LLM, alone: dict, method: str, nth: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[tuple] = []  # pytest would keep the traceback, and with it the matcher
    for module in (guarded, constraints):
        monkeypatch.setattr(module.logger, "exception", lambda *args: logged.append(args))
    Faulty.living.clear()
    make_faulty(llm, method, nth, monkeypatch)
    requests = {"victim": params_of(VICTIM), **others()}
    found, failed = answers(llm, requests, n)
    assert list(failed) == ["victim"]
    error = failed["victim"].to_error()
    assert isinstance(error, InternalError) and error.message == MATCHER_FAILED
    beside = {key: said for key, said in found.items() if key[0] != "victim"}
    assert {key: said for key, said in beside.items() if not key[1]} == alone
    assert [args[1:] for args in logged] == [("victim",)]
    gc.collect()
    assert not Faulty.living, "its matcher is gone"
    # The same constraint is served again.
    monkeypatch.undo()
    assert not answers(llm, {"victim": params_of(VICTIM)})[1]


def test_a_matcher_that_cannot_be_made(llm: LLM, alone: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    make_faulty(llm, None, 1, monkeypatch)
    found, failed = answers(llm, {"victim": params_of(VICTIM), **others()})
    assert list(failed) == ["victim"] and failed["victim"].to_error().message == MATCHER_FAILED
    assert found == alone


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_going_back_behind_wrong_guesses(
    llm: LLM, alone: dict, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = {"victim": params_of(VICTIM)}
    ((tokens, *_),) = answers(llm, victim)[0].values()
    prompt = llm.tokenizer.encode("Answer: ")
    make_faulty(llm, "rollback", nth, monkeypatch)
    oracle = Oracle([prompt + tokens], 0.2, vocab_size=500, seed=1)
    oracle.install(monkeypatch)
    found, failed = answers(llm, {**victim, **others()})
    goes_back = llm._core._scheduler.settings.max_step_drafts > 0
    assert list(failed) == ["victim"] * goes_back
    assert {key: said for key, said in found.items() if key[0] != "victim"} == alone


@pytest.mark.parametrize("method", CALLS)
def test_an_answer_behind_thoughts(llm: LLM, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_faulty(llm, method, 4, monkeypatch)
    thinking = Thinking(end=(300,), budget=5, closing=(300,))
    params = params_of(VICTIM, max_tokens=60, thinking=thinking)
    assert list(answers(llm, {"victim": params})[1]) == ["victim"]
