"""What the scheduler sees of the constraint on an answer."""

from __future__ import annotations

from collections import deque
from typing import Protocol


class Matcher(Protocol):
    """Implemented by `grammar.guarded.GuardedMatcher`, and by fakes in tests.

    `forced` are tokens that must come next. Whoever takes them from there has put them behind the
    known tokens; the matcher itself is behind them already.
    """

    forced: deque[int]

    @property
    def is_over(self) -> bool:
        """Whether the answer is complete, and nothing may follow."""
        ...

    @property
    def excess(self) -> str:
        """What matching takes too much of, so that it allows no token any more; nothing as a rule."""
        ...

    @property
    def has_failed(self) -> bool:
        """Whether it has met a fault of its own, and allows no token any more."""
        ...
