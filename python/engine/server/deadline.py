"""An end to waiting that is a proper refusal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType

from engine.errors import EngineError


class Deadline:
    """Raises `error()` when the body is not done `seconds` after `started_s` (monotonic); 0: no limit."""

    def __init__(self, seconds: float, started_s: float, error: Callable[[], EngineError]) -> None:
        self._scope = asyncio.timeout_at(started_s + seconds) if seconds else None
        self._error = error

    async def __aenter__(self) -> None:
        if self._scope is not None:
            await self._scope.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._scope is None:
            return
        try:
            await self._scope.__aexit__(kind, error, traceback)
        except TimeoutError:
            raise self._error() from None
