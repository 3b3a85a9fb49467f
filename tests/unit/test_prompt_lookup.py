"""Guesses from a text's own repetitions."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from engine.scheduling.prompt_lookup import MOST_NEEDED, NGRAM, PromptLookup


def tokens(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


def told(lookup: PromptLookup, text: np.ndarray, begin: int, most: int = 15) -> tuple[int, int]:
    """Serve `text` from `begin` on as an engine would: (steps, guessed tokens that were wrong)."""
    num_steps = num_wrong = 0
    while begin < len(text):
        guess = lookup.guess(text[:begin], min(most, len(text) - begin - 1))
        is_right = guess == text[begin : begin + len(guess)]
        num_right = len(guess) if is_right.all() else int(is_right.argmin())
        if len(guess):
            lookup.learn(len(guess), num_right)
        num_wrong += len(guess) - num_right
        num_steps += 1
        begin += num_right + 1
    return num_steps, num_wrong


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=80),
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 20), st.integers(0, 20)), max_size=30),
)
def test_a_guess_is_what_followed_the_same_tokens(ids, steps):
    """Whatever came of earlier guesses."""
    text, lookup, begin = tokens(*ids), PromptLookup(), 1
    for count, most, num_right in steps:
        known = text[:begin]
        guess = lookup.guess(known, most).tolist()
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
    text = tokens(9, *[1, 2, 3] * 12)
    assert lookup.guess(text, 10).tolist() == [1, 2, 3, 1, 2, 3, 1, 2, 3, 1]
    assert PromptLookup().guess(tokens(5, 5, 5, 5), 3).tolist() == [5, 5]


def test_an_echo_takes_few_steps():
    passage = np.random.default_rng(0).permutation(1000)[:200]
    text = np.concatenate([passage, passage]).astype(np.int32)
    num_steps, num_wrong = told(PromptLookup(), text, 200)
    assert num_steps <= 20 and num_wrong == 0


def test_an_edited_echo_is_found_again():
    passage = np.random.default_rng(0).permutation(1000)[:300]
    edited = passage.copy()
    edited[49::50] = 2000 + np.arange(6)
    text = np.concatenate([passage, edited]).astype(np.int32)
    num_steps, num_wrong = told(PromptLookup(), text, 300)
    assert num_steps <= 75 and num_wrong < 60


def test_wrong_guesses_become_rare_and_right_ones_frequent_again():
    """After the same two tokens always comes something else: few guesses, then all of an echo."""
    generator = np.random.default_rng(1)
    pairs = [[7, 8, int(token)] for token in generator.permutation(5000)[:700] + 10]
    text = np.concatenate(pairs).astype(np.int32)
    lookup = PromptLookup()
    _, num_wrong = told(lookup, text, 3)
    assert 0 < num_wrong <= 10
    echo = np.concatenate([text, text[300:900]])
    num_steps, _ = told(lookup, echo, len(text))
    assert num_steps <= MOST_NEEDED + 600 / 16 + 10


def test_what_is_needed_is_bounded():
    lookup = PromptLookup()
    for _ in range(20):
        lookup.learn(4, 0)
    assert lookup.num_needed == MOST_NEEDED
    for _ in range(20):
        lookup.learn(4, 4)
    assert lookup.num_needed == NGRAM
