"""Thoughts between tags that are tokens of the vocabulary, told by their tokens: where they are, how many."""

from __future__ import annotations

from collections import deque
from collections.abc import Container
from typing import NamedTuple

from engine.text.formats.reader import Stage


class TagIds(NamedTuple):
    """The tokens of both tags, and those that may come before the first: of white space, or without text."""

    start: int
    end: int
    blank: frozenset[int]


class TagTokens:
    """Follows an output, for its text and for what is bounded by its tokens alike.

    Thoughts are from the first `start_id`, which nothing but blank tokens may come before, or from the
    beginning if there is none, to the first appearance of `end_ids`; both tags belong to them.
    """

    __slots__ = ("_blank_ids", "_end_ids", "_start_id", "_tail", "num_thoughts", "stage")

    def __init__(self, start_id: int | None, end_ids: tuple[int, ...], blank_ids: Container[int]) -> None:
        self._start_id, self._end_ids, self._blank_ids = start_id, end_ids, blank_ids
        self._tail: deque[int] = deque(maxlen=len(end_ids))
        self.num_thoughts = 0
        """Tokens of thoughts so far."""

        self.stage = Stage.THINKING if start_id is None else Stage.UNDECIDED
        """What the next token belongs to."""

    def see(self, token_id: int) -> None:
        """The output goes on with this token."""
        if self.stage is Stage.UNDECIDED:
            if token_id == self._start_id:
                self.stage = Stage.THINKING
            elif token_id not in self._blank_ids:
                self.stage = Stage.ANSWERING
        if self.stage is Stage.THINKING:
            self.num_thoughts += 1
            self._tail.append(token_id)
            if tuple(self._tail) == self._end_ids:
                self.stage = Stage.ANSWERING

    def state(self) -> tuple[Stage, int, tuple[int, ...]]:
        """What `go_back` needs to come back here."""
        return self.stage, self.num_thoughts, tuple(self._tail)

    def go_back(self, state: tuple[Stage, int, tuple[int, ...]]) -> None:
        self.stage, self.num_thoughts, tail = state
        self._tail.clear()
        self._tail.extend(tail)
