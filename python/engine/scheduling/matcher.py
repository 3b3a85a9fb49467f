"""What the scheduler sees of the constraint on an answer."""

from __future__ import annotations

from collections import deque
from typing import Protocol


class Matcher(Protocol):
    """Implemented by `grammar.matcher.ConstraintMatcher`, and by fakes in tests.

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
