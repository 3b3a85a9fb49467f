"""Finds out that the engine's process is alive and does nothing: its requests would wait for ever."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from engine.core.step_board import StepBoard


class Watchdog:
    """Looks at the board. `ask` gives an engine without work some, so that an idle one is found out too."""

    def __init__(self, board: StepBoard, ask: Callable[[], Awaitable[None]]) -> None:
        self._board = board
        self._ask = ask

    async def wait_stuck(self, pulse_s: float, allowed_s: Callable[[], float]) -> float:
        """Returns the seconds without progress once they are more than `allowed_s()`; 0 allows any.

        Only time in which this process ran counts: after a pause of the whole machine nobody is to blame.
        """
        silent_s, seen, looked_s = 0.0, self._board.progress, time.monotonic()
        asked: asyncio.Future[None] = asyncio.ensure_future(self._ask())
        try:
            while True:
                await asyncio.sleep(pulse_s)
                now = time.monotonic()
                silent_s += min(now - looked_s, 2 * pulse_s)
                looked_s = now
                if (progress := self._board.progress) != seen:
                    silent_s, seen = 0.0, progress
                if asked.done():
                    asked = asyncio.ensure_future(self._ask())
                if 0 < allowed_s() < silent_s:
                    return silent_s
        finally:
            asked.cancel()
