"""The adapter of one request, from when it is looked for until the request is over."""

from __future__ import annotations

import asyncio

from engine.core.messages import AdapterRef
from engine.errors import InvalidRequest
from engine.server.adapters import Adapter, AdapterRegistry


def aborted_error() -> InvalidRequest:
    """What a request is told that was aborted before it had an answer."""
    return InvalidRequest("the request was aborted", slug="request_aborted")


class AdapterHold:
    """Belongs to the task that looks for it; another one may abort that. `release` may be called always."""

    def __init__(self, registry: AdapterRegistry) -> None:
        self._registry = registry
        self._adapter: Adapter | None = None
        self._looking: asyncio.Task[object] | None = None
        self._is_aborted = False

    async def find(self, model: str, lora_path: str | None) -> AdapterRef | None:
        """The adapter that a request names, held from now on, even if it has to be read first; None for the
        base model.

        Raises: what `AdapterRegistry.use` raises; `InvalidRequest` (request_aborted).
        """
        self._looking = asyncio.current_task()
        try:
            self._adapter = await self._registry.use(model, lora_path)
        except asyncio.CancelledError:
            if self._is_aborted and self._looking is not None:
                self._looking.uncancel()
                raise aborted_error() from None
            raise
        finally:
            self._looking = None
        return None if self._adapter is None else self._adapter.ref

    def abort(self) -> None:
        """End the search, if it still goes on."""
        if self._looking is not None and not self._is_aborted:
            self._is_aborted = True
            self._looking.cancel()

    def release(self) -> None:
        if self._adapter is not None:
            self._registry.release(self._adapter)
            self._adapter = None
