"""Thoughts before an answer of the bundled model: free of its constraint, and bounded."""

from __future__ import annotations

import json

import numpy as np
import pytest

from engine import LLM, SamplingParams
from engine.sampling.constraint import Constraint, Thinking

PROMPT = "<|im_start|>user\nTell me a story<|im_end|>\n<|im_start|>assistant\n"
CHOICE = Constraint("choice", '["yes, it is", "no, it is not"]')


@pytest.fixture(scope="module", params=[False, True], ids=["jumps", "steps"])
def llm(request):
    with LLM(disable_jump_forward=request.param) as llm:
        yield llm


def ids(llm: LLM, text: str) -> tuple[int, ...]:
    return tuple(llm.tokenizer.encode(text, add_special_tokens=False))


def answer(llm: LLM, thinking: Thinking, constraint: Constraint | None = CHOICE, **fields) -> list[int]:
    params = SamplingParams(
        **{"max_tokens": 60, "temperature": 1, "seed": 1, **fields}, constraint=constraint, thinking=thinking
    )
    (output,) = llm.generate([PROMPT], params)
    return output.outputs[0].token_ids


def text(llm: LLM, token_ids: list[int]) -> str:
    return llm.tokenizer.decode(token_ids)


def is_chosen(words: str) -> bool:
    return words in json.loads(CHOICE.text)


def test_the_constraint_begins_behind_the_thoughts(llm):
    end = ids(llm, ".")
    assert len(end) == 1
    for seed in range(5):
        found = answer(llm, Thinking(end=end), seed=seed)
        at = found.index(end[0])
        assert at > 2, "the model tells a story up to its first full stop"
        assert is_chosen(text(llm, found[at + 1 :]))


def test_an_end_of_several_tokens(llm):
    story = answer(llm, Thinking(end=(0,)), None, temperature=0)
    end = tuple(story[5:8])
    found = answer(llm, Thinking(end=end), temperature=0)
    assert found[:8] == story[:8]
    assert is_chosen(text(llm, found[8:]))


@pytest.mark.parametrize("budget", [3, 4, 7])
def test_thoughts_end_when_their_budget_is_used_up(llm, budget):
    end, closing = ids(llm, "|")[-1:], ids(llm, " so|")
    for constraint in (CHOICE, None):
        found = answer(llm, Thinking(end=end, budget=budget, closing=closing), constraint, temperature=0)
        assert tuple(found[budget - len(closing) : budget]) == closing
        assert (
            found[: budget - len(closing)]
            == answer(llm, Thinking(end=end), None, temperature=0, max_tokens=budget)[: budget - len(closing)]
        )
        if constraint is not None:
            assert is_chosen(text(llm, found[budget:]))


def test_no_budget_ends_them_at_once(llm):
    closing = ids(llm, " so|")
    found = answer(llm, Thinking(end=closing[-1:], budget=0, closing=closing))
    assert tuple(found[: len(closing)]) == closing
    assert is_chosen(text(llm, found[len(closing) :]))


def test_the_model_decides_whether_it_thinks(llm):
    (start,), end = ids(llm, "{"), ids(llm, ".")
    thinking = Thinking(start=start, end=end, budget=6, closing=end)  # the bias would never let it end
    for bias, thinks in ((20, True), (-20, False)):
        found = answer(llm, thinking, logit_bias={start: bias}, temperature=0)
        assert (found[0] == start) == thinks
        rest = found[found.index(end[0]) + 1 :] if thinks else found
        assert is_chosen(text(llm, rest))
    # With a budget for nothing but the end it cannot begin.
    thinking = Thinking(start=start, end=end, budget=1, closing=end)
    for constraint in (CHOICE, None):
        assert answer(llm, thinking, constraint, logit_bias={start: 20}, temperature=0)[0] != start


def test_a_budget_counts_the_beginning(llm):
    (start,), end = ids(llm, "{"), ids(llm, "|")
    thinking = Thinking(start=start, end=end, budget=6, closing=end)
    # Only the first token can begin thoughts: a bias alone would repeat it.
    found = answer(llm, thinking, logit_bias={start: 20}, temperature=0)
    assert found[0] == start and found[5] == end[0] and is_chosen(text(llm, found[6:]))


def test_what_is_blank_may_come_before_thoughts(llm):
    """Which a constraint may allow, and starts afresh behind them."""
    (start,), end, (space,) = ids(llm, "{"), ids(llm, "|"), ids(llm, " ")
    blank = np.array([space], "<i4").tobytes()
    spaced = Constraint("regex", " {2}(yes|no)")
    thinking = Thinking(start=start, end=end, budget=6, closing=end, blank=blank)
    for constraint, liking, places in (
        (spaced, 30, [2]),
        (spaced, 70, [0]),
        (None, 30, range(3, 50)),
        (None, 70, [0]),
    ):
        bias = {space: 50, start: liking}  # each space makes the next one less likely
        params = {"logit_bias": bias, "frequency_penalty": 2, "temperature": 0}
        found = answer(llm, thinking, constraint, **params)
        at = found.index(start)
        assert at in places and found[:at] == [space] * at
        assert found[at + 5] == end[0], "the budget counts from the tag on"
        if constraint is not None:
            assert text(llm, found[at + 6 :]) in ("  yes", "  no")
    too_little = Thinking(start=start, end=end, budget=1, closing=end, blank=blank)
    found = answer(llm, too_little, spaced, logit_bias={space: 50, start: 70}, temperature=0)
    assert start not in found and text(llm, found) in ("  yes", "  no")


def test_thoughts_may_end_the_output_only_without_a_constraint(llm):
    end = ids(llm, "|")
    assert answer(llm, Thinking(end=end), None, max_tokens=500, seed=3)[-1] in llm.tokenizer.eos_token_ids
    found = answer(llm, Thinking(end=end), max_tokens=500, seed=3)
    assert not llm.tokenizer.eos_token_ids.intersection(found[:-1])


def test_both_ways_of_forcing_give_the_same_answers():
    answers = []
    for steps in (True, False):
        with LLM(disable_jump_forward=steps) as llm:
            closing = ids(llm, " so|")
            thinkings = [Thinking(end=closing[-1:], budget=b, closing=closing) for b in (0, 5, 9)]
            answers.append(
                [
                    answer(llm, thinking, constraint, seed=seed)
                    for thinking in thinkings
                    for constraint in (CHOICE, None)
                    for seed in (1, 2)
                ]
            )
    assert answers[0] == answers[1]


def test_where_no_thoughts_may_begin_their_tag_is_text(llm):
    """A constraint that wants it is given its text, of other tokens, for the token would begin thoughts."""
    (start,), end, (space,) = ids(llm, " the"), ids(llm, "."), ids(llm, " ")
    blank = np.array([space], "<i4").tobytes()
    thinking = Thinking(start=start, end=end, budget=0, closing=end, blank=blank)
    for words in (" the", " the end", "  the end", " the the"):
        found = answer(llm, thinking, Constraint("choice", json.dumps([words])))
        assert text(llm, found) == words
        assert next(token for token in found if token != space) != start
