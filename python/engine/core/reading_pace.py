"""When the readers of streams hear of what has arrived."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Protocol

FEW_STREAMS = 8
"""So many readers hear of every token at once."""
LOOKS_A_SECOND = 2000
"""Of the readers of more streams together, until their pause is the longest: to hear of a token, and to write
it to a socket, takes half as long in the server and its client as a small model takes to compute it."""
LONGEST_PAUSE_S = 0.016
"""Between two looks of a reader; a screen shows a picture as long."""


class Reader(Protocol):
    """Who waits for chunks of a request."""

    last_woken_s: float
    """By the event loop's clock."""

    def wake(self) -> None: ...


class ReadingPace:
    """Wakes readers, with a pause between two looks where many streams are open. For one event loop.

    A reader that has rested is woken at once, so that nothing slows down where steps take longer than the
    pause. For those that have not, time is looked at with every step and, should none come, with a timer,
    which may be late by a quarter of the pause. Callers wake by themselves whose stream ends.
    """

    def __init__(self) -> None:
        self._resting: dict[Reader, None] = {}
        self._has_timer = False

    def chunks_arrived(self, readers: Iterable[Reader], num_streams: int) -> None:
        """There is something to read for each of them, where so many streams are open."""
        pause_s = min(num_streams / LOOKS_A_SECOND, LONGEST_PAUSE_S) if num_streams > FEW_STREAMS else 0.0
        self._resting |= dict.fromkeys(readers)
        self._wake_rested(pause_s)

    def _wake_rested(self, pause_s: float) -> None:
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        for reader in [r for r in self._resting if now_s - r.last_woken_s >= pause_s]:
            del self._resting[reader]
            reader.last_woken_s = now_s
            reader.wake()
        if self._resting and not self._has_timer:
            self._has_timer = True
            first_s = min(r.last_woken_s for r in self._resting) + pause_s
            loop.call_at(max(first_s, now_s + pause_s / 4), self._on_timer, pause_s)

    def _on_timer(self, pause_s: float) -> None:
        self._has_timer = False
        self._wake_rested(pause_s)
