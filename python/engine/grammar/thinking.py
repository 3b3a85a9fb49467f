"""Thoughts before an answer: where they end, and when they have to."""

from __future__ import annotations

import enum
from collections import deque

import numpy as np

from engine.grammar.matcher import ConstraintMatcher
from engine.grammar.vocabulary import allow, allow_only, forbid
from engine.sampling.constraint import Thinking


class _State(enum.Enum):
    BEGINNING = enum.auto()
    """The first token is to come: it begins thoughts, or the answer."""

    THINKING = enum.auto()
    ANSWERING = enum.auto()


class ThinkingMatcher:
    """An answer behind thoughts, with a constraint of its own or without. Stands in for its matcher.

    The constraint's first forced tokens wait until the thoughts are over. What closes thoughts that took
    too long comes before them, as forced tokens too.
    """

    __slots__ = ("_answer", "_forced", "_num_tokens", "_state", "_tail", "_thinking")

    def __init__(self, thinking: Thinking, answer: ConstraintMatcher | None) -> None:
        self._thinking, self._answer = thinking, answer
        self._forced: deque[int] = deque()
        self._tail: deque[int] = deque(maxlen=len(thinking.end))
        self._num_tokens = 0
        self._state = _State.THINKING if thinking.start is None else _State.BEGINNING
        if thinking.start is None:
            self._close_if_used_up()

    @property
    def forced(self) -> deque[int]:
        """Tokens that must come next."""
        if self._state is _State.ANSWERING and self._answer is not None:
            return self._answer.forced
        return self._forced

    @property
    def is_over(self) -> bool:
        """Whether the answer is complete, and nothing may follow."""
        return self._state is _State.ANSWERING and self._answer is not None and self._answer.is_over

    @property
    def excess(self) -> str:
        """What matching takes too much of; nothing as a rule."""
        return "" if self._answer is None else self._answer.excess

    def fill(self, row: np.ndarray) -> None:
        """Write the bitmask of the next token, int32 [ceil(V / 32)]."""
        if self._state is _State.ANSWERING:
            self._fill_answer(row)
        elif self._state is _State.THINKING:
            row[:] = -1
            if self._answer is not None:
                self._answer.forbid_end(row)
        else:
            self._fill_answer(row)
            assert self._thinking.start is not None
            if self._may_think:
                allow(row, self._thinking.start)
            else:
                forbid(row, [self._thinking.start])

    def take(self, token_id: int) -> None:
        """Go on behind a token that was drawn."""
        if self._state is _State.BEGINNING:
            begins = token_id == self._thinking.start
            self._state = _State.THINKING if begins else _State.ANSWERING
        if self._state is _State.THINKING:
            self._take_thought(token_id)
        elif self._answer is not None:
            self._answer.take(token_id)
        elif self._forced:
            self._forced.popleft()

    def state(self) -> tuple:
        """What `go_back` needs to come back here."""
        answer = None if self._answer is None else self._answer.state()
        return answer, self._state, self._num_tokens, tuple(self._tail), tuple(self._forced)

    def go_back(self, state: tuple) -> None:
        """Forget everything since `state` was given."""
        answer, self._state, self._num_tokens, tail, forced = state
        if self._answer is not None:
            self._answer.go_back(answer)
        self._tail.clear()
        self._tail.extend(tail)
        self._forced.clear()
        self._forced.extend(forced)

    @property
    def _may_think(self) -> bool:
        budget = self._thinking.budget
        return budget is None or budget > len(self._thinking.closing)

    def _fill_answer(self, row: np.ndarray) -> None:
        answer = self._answer
        if answer is None:
            row[:] = -1
            if self._forced:
                allow_only(row, self._forced[0])
        else:
            answer.fill(row)

    def _take_thought(self, token_id: int) -> None:
        self._num_tokens += 1
        self._tail.append(token_id)
        if tuple(self._tail) == self._thinking.end:
            self._state = _State.ANSWERING
        else:
            self._close_if_used_up()

    def _close_if_used_up(self) -> None:
        budget, closing = self._thinking.budget, self._thinking.closing
        if budget is not None and self._num_tokens + len(closing) >= budget:
            self._state = _State.ANSWERING
            self.forced.extendleft(reversed(closing))
