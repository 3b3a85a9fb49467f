"""Thoughts that are messages within an answer, as gpt-oss writes them: how many tokens they may take."""

from __future__ import annotations

from collections import deque

import numpy as np

from engine.grammar.matcher import ConstraintMatcher
from engine.grammar.vocabulary import Vocabulary, allow, without
from engine.sampling.constraint import ThoughtMessages
from engine.text.formats.channel_tokens import ChannelTokens
from engine.text.formats.harmony import THOUGHTS_NAME


class BoundedThoughts:
    """An answer whose constraint says what its messages are. Stands in for its matcher.

    Once there is room for nothing but its end, a message of thoughts ends, by a forced token; and where a
    channel is named, thoughts are chosen only while there is room for a message of them.
    """

    __slots__ = ("_answer", "_budget", "_end_id", "_least", "_no_thoughts", "_opening_id", "_tokens")

    def __init__(self, thoughts: ThoughtMessages, answer: ConstraintMatcher, vocabulary: Vocabulary) -> None:
        self._answer, self._budget, self._end_id = answer, thoughts.budget, thoughts.end
        self._tokens = ChannelTokens(thoughts.channel, thoughts.end, vocabulary.tokens.__getitem__)
        opening = vocabulary.canonical(THOUGHTS_NAME.encode())
        self._opening_id = opening[0]
        self._least = 1 + len(opening) + 1  # what names the channel, and the end
        self._no_thoughts = without(
            len(vocabulary.tokens), vocabulary.beginning_with(ChannelTokens.NAME_START)
        )
        self._saw(answer.forced)

    @property
    def forced(self) -> deque[int]:
        """Tokens that must come next."""
        return self._answer.forced

    @property
    def is_over(self) -> bool:
        """Whether the answer is complete, and nothing may follow."""
        return self._answer.is_over

    @property
    def excess(self) -> str:
        """What matching takes too much of; nothing as a rule."""
        return self._answer.excess

    def mask(self, row: np.ndarray) -> np.ndarray:
        """The bitmask of the next token, int32 [ceil(V / 32)]: `row`, overwritten, or an array that must
        not be written to."""
        mask = self._answer.mask(row)
        if not self._tokens.is_naming or self.forced:
            return mask
        np.bitwise_and(mask, self._no_thoughts, out=row)
        if self._tokens.num_thoughts + self._least <= self._budget:
            allow(row, self._opening_id)
        return row

    def take(self, token_id: int) -> None:
        """Go on behind a token that was drawn."""
        was_forced = bool(self.forced)
        self._answer.take(token_id)
        if not was_forced:
            self._saw([token_id, *self.forced])

    def state(self) -> tuple:
        """What `go_back` needs to come back here."""
        return self._answer.state(), self._tokens.state()

    def go_back(self, state: tuple) -> None:
        """Forget everything since `state` was given."""
        answer, tokens = state
        self._answer.go_back(answer)
        self._tokens.go_back(tokens)

    def _saw(self, token_ids: list[int] | deque[int]) -> None:
        """The answer has got as far as behind these."""
        for token_id in token_ids:
            self._tokens.see(token_id)
        if self._tokens.is_thinking and self._tokens.num_thoughts + 1 >= self._budget:
            num_forced = len(self.forced)
            self._answer.force(self._end_id)
            self._saw(list(self.forced)[num_forced:])
