"""An end to waiting that is a proper refusal."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from engine.errors import EngineError


@contextlib.asynccontextmanager
async def in_time(seconds: float, started_s: float, error: Callable[[], EngineError]) -> AsyncIterator[None]:
    """Raises `error()` when the body is not done `seconds` after `started_s` (monotonic); 0: no limit."""
    scope = asyncio.timeout_at(started_s + seconds if seconds else None)
    try:
        async with scope:
            yield
    except TimeoutError:
        if not scope.expired():
            raise
        raise error() from None
