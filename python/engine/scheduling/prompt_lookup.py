"""Guesses what comes next in a text from what came next where it said the same before."""

from __future__ import annotations

import numpy as np

from engine._native import find_repetition

NGRAM = 5
"""Tokens by which a place is found; the next one must be the same before anything is guessed."""
FIRST_CREDIT = 2
"""Guesses that may be wrong before any was right."""
MOST_CREDIT = 32
"""Guesses that may be wrong after many were right."""
TOKENS_PER_CREDIT = 32
"""Tokens that were not guessed and earn another guess, whatever came of those before."""
MORE_BESIDE = 3
"""Tokens more that must be the same for each other request in the step, up to `MOST_BESIDE` of these: the
more rows a step has, the less of its time is saved by a row less later, and the more is lost by one more."""
MOST_BESIDE = 16
_MOST_AGREED = NGRAM + MORE_BESIDE * MOST_BESIDE + MOST_CREDIT


class PromptLookup:
    """Follows one request. A place where its last tokens stood before is its source: as long as the text
    goes on as it did there, the source moves along, and what follows it is the guess.

    Each token that has been the same since the place was found is worth one guess. Wrong guesses are paid
    for by right ones: there are never more of them than of those, but for `FIRST_CREDIT` and one in
    `TOKENS_PER_CREDIT` other tokens. So a text that does not repeat itself costs next to nothing, and a text
    that begins to is noticed.

    Cost: a look passes over the text once, at some 10 GB/s, and comes when the new tokens can be enough for a
    guess: after two of them, or 23 in a step of eight requests.
    Source: Saxena, "Prompt lookup decoding" (2023).
    """

    __slots__ = ("_credit", "_num_agreed", "_num_paid", "_num_seen", "_source", "look_from")

    def __init__(self) -> None:
        self._credit = FIRST_CREDIT * TOKENS_PER_CREDIT  # in parts of a guess
        self._num_paid = 0  # known tokens that have earned their part, or were guessed, or were there before
        self._num_agreed = 0
        self._num_seen = 0
        self._source = 0  # none
        self.look_from = NGRAM + 1
        """Before so many tokens are known, and `MORE_BESIDE` for each other request of the step, `guess`
        finds nothing, whatever they are."""

    def guess(self, known: np.ndarray, most: int, num_beside: int = 0) -> list[int]:
        """At most `most` tokens to come after the known ones; often none.

        `num_beside`: how many other requests are in the step, which call for more agreement.
        """
        num_known, more = len(known), MORE_BESIDE * min(num_beside, MOST_BESIDE)
        if num_known < self.look_from + more:
            return []
        self._earn(num_known - (self._num_paid or num_known))
        self._num_paid = num_known
        if self._credit < TOKENS_PER_CREDIT:
            self.look_from = num_known + TOKENS_PER_CREDIT - self._credit
            return []
        self._follow(known)
        num_agreed = self._num_agreed if self._source else NGRAM - 1  # at most, of those seen so far
        self.look_from = num_known + NGRAM + 1 - num_agreed
        count = min(most, num_agreed - NGRAM - more, self._credit // TOKENS_PER_CREDIT)
        if count <= 0:
            return []
        guess = known[self._source : self._source + count].tolist()
        while len(guess) < count:  # a short loop goes round
            guess += guess[: count - len(guess)]
        return guess

    def learn(self, num_guessed: int, num_right: int) -> None:
        """Hear what came of the last guess."""
        self._earn((2 * num_right - num_guessed) * TOKENS_PER_CREDIT)
        self._num_paid += num_right

    def _earn(self, parts: int) -> None:
        self._credit = min(self._credit + parts, MOST_CREDIT * TOKENS_PER_CREDIT)

    def _follow(self, known: np.ndarray) -> None:
        """Move the source along with the new tokens, or find another one."""
        begin, end = self._num_seen, len(known)
        self._num_seen = end
        if self._source:
            moved = self._source + end - begin
            if known[self._source : moved].tobytes() == known[begin:end].tobytes():
                self._source = moved
                self._num_agreed += end - begin
                return
        self._source, self._num_agreed = find_repetition(known, NGRAM, _MOST_AGREED)
