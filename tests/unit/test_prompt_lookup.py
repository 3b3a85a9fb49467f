"""Guesses from a text's own repetitions."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from engine._native import find_repetition
from engine.scheduling.prompt_lookup import (
    FIRST_CREDIT,
    MORE_BESIDE,
    MOST_BESIDE,
    MOST_CREDIT,
    NGRAM,
    TOKENS_PER_CREDIT,
    PromptLookup,
)


def tokens(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


def told(lookup: PromptLookup, text: np.ndarray, begin: int, most: int = 15) -> tuple[int, int]:
    """Serve `text` from `begin` on as an engine would: (steps, guessed tokens that were wrong)."""
    num_steps = num_wrong = 0
    while begin < len(text):
        guess = np.array(lookup.guess(text[:begin], min(most, len(text) - begin - 1)), np.int32)
        is_right = guess == text[begin : begin + len(guess)]
        num_right = len(guess) if is_right.all() else int(is_right.argmin())
        if len(guess):
            lookup.learn(len(guess), num_right)
        num_wrong += len(guess) - num_right
        num_steps += 1
        begin += num_right + 1
    return num_steps, num_wrong


@given(
    st.one_of(
        st.lists(st.integers(0, 1), max_size=300),
        st.tuples(st.lists(st.integers(0, 3), max_size=9), st.integers(0, 200)).map(
            lambda parts: [*parts[0], *range(10, 10 + parts[1]), *parts[0]]
        ),
    ),
    st.integers(2, 6),
    st.integers(0, 9),
)
def test_the_last_place_with_the_same_tokens(ids, num_wanted, more):
    most = num_wanted + more

    def num_agreed(end: int) -> int:
        same = [a == b for a, b in zip(reversed(ids[:end]), reversed(ids), strict=False)]
        return min(most, (*same, False).index(False))

    ends = [end for end in range(1, len(ids)) if num_agreed(end) >= num_wanted]
    expected = (ends[-1], num_agreed(ends[-1])) if ends else (0, 0)
    assert find_repetition(tokens(*ids), num_wanted, most) == expected


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=80),
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 20), st.integers(0, 20)), max_size=30),
)
def test_a_guess_is_what_followed_the_same_tokens(ids, steps):
    """Whatever came of earlier guesses."""
    text, lookup, begin = tokens(*ids), PromptLookup(), 1
    for count, most, num_right in steps:
        known = text[:begin]
        guess = lookup.guess(known, most)
        assert len(guess) <= most
        if guess:
            ends = [e for e in range(NGRAM, begin) if (known[e - NGRAM : e] == known[-NGRAM:]).all()]
            goes_on = [known[[e + i % (begin - e) for i in range(len(guess))]].tolist() for e in ends]
            assert guess in goes_on
            lookup.learn(len(guess), min(num_right, len(guess)))
        begin = min(begin + count, len(text))


def test_nothing_is_guessed_where_nothing_repeats():
    lookup = PromptLookup()
    for length in range(1, 200):
        assert len(lookup.guess(np.arange(length, dtype=np.int32), 15)) == 0


def test_a_loop_goes_round():
    lookup = PromptLookup()
    lookup.learn(20, 20)
    text = tokens(9, *[1, 2, 3] * 12)
    assert lookup.guess(text, 10) == [1, 2, 3, 1, 2, 3, 1, 2, 3, 1]
    assert PromptLookup().guess(tokens(*[5] * 12), 2) == [5, 5]


def test_an_echo_takes_few_steps():
    passage = np.random.default_rng(0).permutation(1000)[:200]
    text = np.concatenate([passage, passage]).astype(np.int32)
    num_steps, num_wrong = told(PromptLookup(), text, 200)
    assert num_steps <= 24 and num_wrong == 0


def test_an_edited_echo_is_found_again():
    passage = np.random.default_rng(0).permutation(1000)[:300]
    edited = passage.copy()
    edited[49::50] = 2000 + np.arange(6)
    text = np.concatenate([passage, edited]).astype(np.int32)
    num_steps, num_wrong = told(PromptLookup(), text, 300)
    assert num_steps <= 80 and num_wrong < 60


@given(st.integers(0, 2**32), st.lists(st.integers(1, 40), min_size=1, max_size=6), st.floats(0, 0.5))
def test_wrong_guesses_are_paid_for_by_right_ones(seed, lens, error_rate):
    """Texts of passages that are said again and again, with other tokens here and there."""
    generator = np.random.default_rng(seed)
    passages = [generator.integers(0, 1000, length) for length in lens]
    text = np.concatenate([passages[i] for i in generator.integers(0, len(lens), 30)]).astype(np.int32)
    wrong = generator.random(len(text)) < error_rate
    text[wrong] = generator.integers(0, 1000, int(wrong.sum()))
    num_steps, num_wrong = told(PromptLookup(), text, 1)
    num_right = len(text) - 1 - num_steps
    assert num_wrong <= num_right + FIRST_CREDIT + num_steps / TOKENS_PER_CREDIT


def test_where_guesses_are_wrong_they_stop_and_begin_again_where_they_are_right():
    """After the same six tokens comes something else each time; then all of that once more."""
    generator = np.random.default_rng(1)
    runs = [[*range(6), int(token)] for token in generator.permutation(5000)[:200] + 10]
    text = np.concatenate(runs).astype(np.int32)
    lookup = PromptLookup()
    num_steps, num_wrong = told(lookup, text, 7)
    assert FIRST_CREDIT < num_wrong <= FIRST_CREDIT + len(text) / TOKENS_PER_CREDIT
    assert num_steps == len(text) - 7
    echo = np.concatenate([text, text[300:900]])
    num_steps, _ = told(lookup, echo, len(text))
    assert num_steps < 200


def test_a_crowded_step_calls_for_more_agreement():
    text = np.tile(np.arange(100, dtype=np.int32), 2)
    for num_beside in (0, 3, MOST_BESIDE, 1000):
        lookup = PromptLookup()
        first = next(end for end in range(100, 200) if lookup.guess(text[:end], 15, num_beside))
        assert first == 100 + NGRAM + 1 + MORE_BESIDE * min(num_beside, MOST_BESIDE)


def test_credit_is_bounded():
    """A long echo does not pay for a long time of wrong guesses."""
    lookup = PromptLookup()
    told(lookup, np.tile(np.arange(50, dtype=np.int32), 40), 50)
    num_wrong = 0
    known = np.tile(np.arange(50, dtype=np.int32), 41)
    for _ in range(50):
        guess = lookup.guess(known, 15)
        num_wrong += len(guess)
        if guess:
            lookup.learn(len(guess), 0)
    assert 15 < num_wrong <= MOST_CREDIT + 2
