"""A matcher that may fail without anybody else's harm."""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from engine.grammar.matcher import AnyMatcher

logger = logging.getLogger(__name__)


class GuardedMatcher:
    """Stands in for the matcher of an answer. A fault in it is one of this answer, not of the step.

    From the first one on the matcher is gone, `has_failed` is true, and no token is forced or allowed.
    `name` is the request's, for the log.
    """

    __slots__ = ("_matcher", "_name", "_no_tokens", "has_failed")

    def __init__(self, matcher: AnyMatcher, name: str) -> None:
        self._matcher: AnyMatcher | None = matcher
        self._name = name
        self._no_tokens: deque[int] = deque()
        self.has_failed = False

    @property
    def forced(self) -> deque[int]:
        """Tokens that must come next."""
        return self._no_tokens if self._matcher is None else self._matcher.forced

    @property
    def is_over(self) -> bool:
        """Whether the answer is complete, and nothing may follow."""
        return self._matcher is not None and self._matcher.is_over

    @property
    def excess(self) -> str:
        """What matching takes too much of; nothing as a rule."""
        return "" if self._matcher is None else self._matcher.excess

    def mask(self, row: np.ndarray) -> np.ndarray:
        """The bitmask of the next token, int32 [ceil(V / 32)]: `row`, overwritten, or an array that must
        not be written to."""
        try:
            if self._matcher is not None:
                return self._matcher.mask(row)
        except Exception:
            self._fail()
        row[:] = 0
        return row

    def take(self, token_id: int) -> None:
        """Go on behind a token that was drawn."""
        try:
            if self._matcher is not None:
                self._matcher.take(token_id)
        except Exception:
            self._fail()

    def state(self) -> tuple:
        """What `go_back` needs to come back here."""
        return () if self._matcher is None else self._matcher.state()

    def go_back(self, state: tuple) -> None:
        """Forget everything since `state` was given."""
        try:
            if self._matcher is not None:
                self._matcher.go_back(state)
        except Exception:
            self._fail()

    def _fail(self) -> None:
        logger.exception("a matcher failed, and with it %s", self._name)
        self._matcher, self.has_failed = None, True
