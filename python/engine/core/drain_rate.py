"""How fast requests come to their end, and so when a refused one may find a place."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

_WINDOW = 64
_LEAST_S, _MOST_S = 1.0, 60.0


class DrainRate:
    """Measured over the last `_WINDOW` ends, up to now: an engine that stands still gets slower. Time without
    any request does not count.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends_s: deque[float] = deque(maxlen=_WINDOW)
        self._idle_since_s: float | None = clock()
        self._idle_s = 0.0

    def note_begin(self) -> None:
        """There is a request."""
        if self._idle_since_s is not None:
            self._idle_s += self._clock() - self._idle_since_s
            self._idle_since_s = None

    def note_idle(self) -> None:
        """There is none any more."""
        if self._idle_since_s is None:
            self._idle_since_s = self._clock()

    def note_end(self) -> None:
        """A request came to its end."""
        self._ends_s.append(self._busy_s)

    def wait_s(self, num_before: int) -> float:
        """Seconds until `num_before` requests and one more will have ended, in [1, 60]."""
        if len(self._ends_s) < 2:
            return _LEAST_S
        rate = (len(self._ends_s) - 1) / max(self._busy_s - self._ends_s[0], 1e-3)
        return min(max((num_before + 1) / rate, _LEAST_S), _MOST_S)

    @property
    def _busy_s(self) -> float:
        """The time, less that without requests."""
        now = self._clock() if self._idle_since_s is None else self._idle_since_s
        return now - self._idle_s
