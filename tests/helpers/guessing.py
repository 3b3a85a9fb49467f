"""Drafts from whoever knows the answer, wrong now and then: they are accepted and refused at every place."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from engine.scheduling import drafts


class Oracle:
    """Stands in for `PromptLookup` in every request. `texts` are prompts with their whole answers.

    A guess goes on like a text that begins with the known tokens; each of its tokens is replaced by
    another with the probability `error_rate`, and its length is drawn.
    """

    def __init__(self, texts: Sequence[Sequence[int]], error_rate: float, vocab_size: int, seed: int) -> None:
        self._texts = [np.array(text, np.int32) for text in texts]
        self._draw = random.Random(seed)
        self._error_rate, self._vocab_size = error_rate, vocab_size
        self.num_guessed = self.num_right = self.num_cut_short = 0

    def install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(drafts, "PromptLookup", lambda: self)

    look_from = 0

    def guess(self, known: np.ndarray, most: int, num_beside: int) -> list[int]:
        begins = [text for text in self._texts if len(text) > len(known)]
        same = [text for text in begins if np.array_equal(text[: len(known)], known)]
        if not same or most <= 0:
            return []
        guess = self._draw.choice(same)[len(known) :][: self._draw.randint(1, most)].tolist()
        for i in range(len(guess)):
            if self._draw.random() < self._error_rate:
                guess[i] = self._draw.randrange(self._vocab_size)
        return guess

    def learn(self, num_guessed: int, num_right: int) -> None:
        self.num_guessed += num_guessed
        self.num_right += num_right
        self.num_cut_short += 0 < num_right < num_guessed
