"""An end to waiting that is a proper refusal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic
from types import TracebackType

from engine.config.server_config import ServerConfig
from engine.core.client import EngineClient
from engine.errors import EngineError, Overloaded


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


class Deadlines:
    """Those of one request, from now on. What is not done in time raises `Overloaded`."""

    def __init__(self, config: ServerConfig, client: EngineClient) -> None:
        self._config, self._client = config, client
        self._started_s = monotonic()

    def until_run(self) -> Deadline:
        """For a body that waits for a running slot."""
        return Deadline(self._config.queue_timeout, self._started_s, self._waited_too_long)

    def until_done(self) -> Deadline:
        """For a body that is a part of what the request may take in all."""
        return Deadline(self._config.request_timeout, self._started_s, self._took_too_long)

    def _waited_too_long(self) -> Overloaded:
        message = f"The request waited {self._config.queue_timeout:g} s and was not run (--queue-timeout)."
        return Overloaded(message, slug="queue_timeout", retry_after_s=self._client.retry_after_s)

    def _took_too_long(self) -> Overloaded:
        message = f"The request took longer than {self._config.request_timeout:g} s (--request-timeout)."
        return Overloaded(message, slug="request_timeout", retry_after_s=self._client.retry_after_s)
