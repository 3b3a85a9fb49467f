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
    pause; those that have not are woken together. Callers wake by themselves whose stream ends.
    """

    def __init__(self) -> None:
        self._resting: dict[Reader, None] = {}

    def chunks_arrived(self, readers: Iterable[Reader], num_streams: int) -> None:
        """There is something to read for each of them, where so many streams are open."""
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        pause_s = min(num_streams / LOOKS_A_SECOND, LONGEST_PAUSE_S) if num_streams > FEW_STREAMS else 0.0
        for reader in readers:
            if now_s - reader.last_woken_s >= pause_s:
                reader.last_woken_s = now_s
                reader.wake()
                continue
            if not self._resting:
                loop.call_later(pause_s, self._wake_all)
            self._resting[reader] = None

    def _wake_all(self) -> None:
        readers, self._resting = self._resting, {}
        now_s = asyncio.get_running_loop().time()
        for reader in readers:
            reader.last_woken_s = now_s
            reader.wake()
