"""When the readers of streams hear of what has arrived."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Protocol

FEW_STREAMS = 8
"""So many readers hear of every token at once."""
PAUSE_S = 0.008
"""More of them rest so long between two looks: to hear of a token, and to write it to a socket, costs the
server and its clients more than small models take to compute it."""


class Reader(Protocol):
    """Who waits for chunks of a request."""

    last_woken_s: float
    """By the event loop's clock."""

    def wake(self) -> None: ...


class ReadingPace:
    """Wakes readers, of many streams each at most every `PAUSE_S`. For one event loop.

    A reader that has rested is woken at once, so that nothing slows down where steps take longer than the
    pause; those that have not are woken together. Callers wake by themselves whose stream ends.
    """

    def __init__(self) -> None:
        self._resting: dict[Reader, None] = {}

    def chunks_arrived(self, readers: Iterable[Reader], num_streams: int) -> None:
        """There is something to read for each of them, where so many streams are open."""
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        for reader in readers:
            if num_streams <= FEW_STREAMS or now_s - reader.last_woken_s >= PAUSE_S:
                reader.last_woken_s = now_s
                reader.wake()
                continue
            if not self._resting:
                loop.call_later(PAUSE_S, self._wake_all)
            self._resting[reader] = None

    def _wake_all(self) -> None:
        readers, self._resting = self._resting, {}
        now_s = asyncio.get_running_loop().time()
        for reader in readers:
            reader.last_woken_s = now_s
            reader.wake()
