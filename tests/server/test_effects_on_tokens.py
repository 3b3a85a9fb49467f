"""Fields that choose tokens: what each does, at its default and at both ends of its range."""

from __future__ import annotations

from collections import Counter
from typing import Any

from helpers.effects import LARGEST, VOCAB, Asker, Table

TABLE = Table()


@TABLE.row("temperature", 1, 0, 2)
def _(ask: Asker, low: float, high: float) -> None:
    kinds = [len(ask.first_ids(temperature=t)) for t in (low, 1, high)]
    assert kinds[0] == 1 < kinds[1] < kinds[2]


@TABLE.row("top_p", 1, 1e-300, 1)
def _(ask: Asker, low: float, high: float) -> None:
    assert len(ask.first_ids(top_p=low, temperature=2)) == 1
    assert ask.first_ids(top_p=high) == ask.first_ids()
    assert set(ask.first_ids(top_p=0.5)) < set(ask.first_ids())


@TABLE.row("top_k", -1, -1, LARGEST)
def _(ask: Asker, low: int, high: int) -> None:
    free = ask.first_ids(temperature=2)
    for off in (low, 0, VOCAB, high):
        assert ask.first_ids(top_k=off, temperature=2) == free
    assert set(ask.first_ids(top_k=1, temperature=2)) == set(ask.first_ids(temperature=0))
    assert len(ask.first_ids(top_k=2, temperature=2)) == 2


@TABLE.row("min_p", 0, 0, 1)
def _(ask: Asker, low: float, high: float) -> None:
    assert ask.first_ids(min_p=low, temperature=2) == ask.first_ids(temperature=2)
    assert ask.first_ids(min_p=high, temperature=2) == ask.first_ids(temperature=0)


def first_change(ask: Asker, **fields: Any) -> tuple[Counter[int], int, int]:
    """Where a greedy answer first becomes another one: (tokens written before, the token without, with)."""
    free, changed = (ask.ids(temperature=0, max_tokens=300, ignore_eos=True, **f)[0] for f in ({}, fields))
    at = next(i for i, (a, b) in enumerate(zip(free, changed, strict=True)) if a != b)
    return Counter(free[:at]), free[at], changed[at]


@TABLE.row("frequency_penalty", 0, -2, 2)
def _(ask: Asker, low: float, high: float) -> None:
    """Up to the first change all scores are the same, so it says which token the penalty was for."""
    written, without, rewarded = first_change(ask, frequency_penalty=low)
    assert written[rewarded] > written[without]
    written, without, spared = first_change(ask, frequency_penalty=high)
    assert written[spared] < written[without]


@TABLE.row("presence_penalty", 0, -2, 2)
def _(ask: Asker, low: float, high: float) -> None:
    written, without, rewarded = first_change(ask, presence_penalty=low)
    assert written[rewarded] > 0 == written[without]
    written, without, spared = first_change(ask, presence_penalty=high)
    assert written[spared] == 0 < written[without]


@TABLE.row("repetition_penalty", 1, 1e-6, 2)
def _(ask: Asker, low: float, high: float) -> None:
    answer = ask(repetition_penalty=low, max_tokens=30, ignore_eos=True)
    (choice,) = answer["choices"]
    prompt_ids = (answer if ask.is_chat else choice)["prompt_token_ids"]
    assert set(choice["token_ids"]) <= set(prompt_ids), "what was said has nearly all of the probability"
    written, without, _ = first_change(ask, repetition_penalty=high)
    assert without in written or without in prompt_ids


@TABLE.row("logit_bias", {}, {"0": -100, "4095": -100}, {"4095": 100})
def _(ask: Asker, low: dict[str, int], high: dict[str, int]) -> None:
    assert set(ask.first_ids(logit_bias=high)) == {4095}
    best = next(iter(ask.first_ids(temperature=0)))
    assert best not in ask.first_ids(logit_bias={str(best): -100})
    assert ask.first_ids(logit_bias={str(best): 0}) == ask.first_ids()
    assert ask.first_ids(logit_bias=low)  # both ends of the vocabulary


@TABLE.row("seed", None, -(2**63), LARGEST)
def _(ask: Asker, low: int, high: int) -> None:
    answers = [ask.ids(seed=seed, max_tokens=30) for seed in (low, -1, 0, 1, high)]
    assert [ask.ids(seed=seed, max_tokens=30) for seed in (low, -1, 0, 1, high)] == answers
    assert len({str(ids) for ids in answers}) == 5
    assert "x-seed" not in ask.post(seed=low).headers
    drawn = [ask.post(max_tokens=30).headers["x-seed"] for _ in range(2)]
    assert drawn[0] != drawn[1]


@TABLE.cases()
def test_the_ends_of_its_range_do_what_they_are_for(ask: Asker, name: str) -> None:
    TABLE.check_ends(ask, name)


@TABLE.cases()
def test_its_default_is_what_happens_without_it(ask: Asker, name: str) -> None:
    TABLE.check_default(ask, name)
