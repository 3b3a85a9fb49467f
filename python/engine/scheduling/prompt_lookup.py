"""Guesses what comes next in a text from what came next where it said the same before."""

from __future__ import annotations

import numpy as np

NGRAM = 5
"""Tokens by which a place is found; the next one must be the same before anything is guessed."""
FIRST_CREDIT = 2
"""Guesses that may be wrong before any was right."""
MOST_CREDIT = 32
"""Guesses that may be wrong after many were right."""
STEPS_PER_CREDIT = 32
"""Steps that earn another guess, whatever came of those before."""
MOST_BESIDE = 16
_TOKEN_BYTES = 4


class PromptLookup:
    """Follows one request. A place where its last tokens stood before is its source: as long as the text
    goes on as it did there, the source moves along, and what follows it is the guess.

    Each token that has been the same since the place was found is worth one guess. Wrong guesses are paid
    for by right ones: there are never more of them than of those, but for `FIRST_CREDIT` and one in
    `STEPS_PER_CREDIT` steps. So a text that does not repeat itself costs next to nothing, and a text that
    begins to is noticed.

    Cost: about 1 us a token, of the prompt too, less in steps of many requests; 200 bytes a token.
    Source: Saxena, "Prompt lookup decoding" (2023).
    """

    __slots__ = ("_credit", "_end_of", "_num_agreed", "_num_seen", "_source")

    def __init__(self) -> None:
        self._credit = FIRST_CREDIT * STEPS_PER_CREDIT  # in parts of a guess
        self._num_agreed = 0
        self._num_seen = NGRAM - 1
        self._end_of: dict[bytes, int] = {}  # by NGRAM tokens, for their last appearance
        self._source: int | None = None

    def guess(self, known: np.ndarray, most: int, num_beside: int = 0) -> list[int]:
        """At most `most` tokens to come after the known ones; often none. Called once a step.

        `num_beside`: how many other requests are in the step. Each calls for one more token that is the
        same, up to `MOST_BESIDE`: the more rows a step has, the less of its time is saved by one row less
        later, and the more is lost by one too many.
        """
        self._earn(1)
        wanted = NGRAM + min(num_beside, MOST_BESIDE)
        most_agreed = (NGRAM - 1 if self._source is None else self._num_agreed) + len(known) - self._num_seen
        if most_agreed <= wanted or self._credit < STEPS_PER_CREDIT:
            return []  # whatever the new tokens are: they are looked at when something may come of it
        self._follow(known)
        count = min(most, self._num_agreed - wanted, self._credit // STEPS_PER_CREDIT)
        if self._source is None or count <= 0:
            return []
        guess = known[self._source : self._source + count].tolist()
        while len(guess) < count:  # a short loop goes round
            guess += guess[: count - len(guess)]
        return guess

    def learn(self, num_guessed: int, num_right: int) -> None:
        """Hear what came of the last guess."""
        self._earn((2 * num_right - num_guessed) * STEPS_PER_CREDIT)

    def _earn(self, parts: int) -> None:
        self._credit = min(self._credit + parts, MOST_CREDIT * STEPS_PER_CREDIT)

    def _follow(self, known: np.ndarray) -> None:
        """Move the source along with the new tokens, or find another one."""
        begin, end = self._num_seen, len(known)
        if end <= begin:
            return
        self._num_seen = end
        found = self._remember(known, begin, end)
        if self._source is not None:
            moved = self._source + end - begin
            if known[self._source : moved].tobytes() == known[begin:end].tobytes():
                self._source = moved
                self._num_agreed += end - begin
                return
        self._source = found
        self._num_agreed = 0 if found is None else _num_equal(known, found)

    def _remember(self, known: np.ndarray, begin: int, end: int) -> int | None:
        """Note the n-grams that end behind `begin`; where the last of them ended before."""
        data = known[begin + 1 - NGRAM : end].tobytes()
        end_of, found = self._end_of, None
        for last in range(begin + 1, end + 1):
            at = (last - begin - 1) * _TOKEN_BYTES
            ngram = data[at : at + NGRAM * _TOKEN_BYTES]
            found = end_of.get(ngram)
            end_of[ngram] = last
        return found


def _num_equal(known: np.ndarray, end: int) -> int:
    """How many tokens before `end` are the same as the last ones, as far as that matters."""
    count = min(end, NGRAM + MOST_CREDIT)
    differs = known[end - count : end][::-1] != known[-count:][::-1]
    return int(differs.argmax()) if differs.any() else count
