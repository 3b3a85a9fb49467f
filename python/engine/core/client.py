"""The seam between the text side (server, LLM) and the engine, wherever that runs."""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Awaitable
from typing import Protocol

from engine.core.messages import (
    AdapterLoaded,
    Admitted,
    Embedded,
    EmbedRequest,
    EngineReady,
    EngineStats,
    GenerateRequest,
    TokenChunk,
)


class EngineState(enum.Enum):
    """What the engine is doing; only `READY` accepts requests."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    RESTARTING = "restarting"
    FAILED = "failed"


class RequestStream(Protocol):
    """The results of one admitted request, all choices interleaved."""

    admitted: Admitted
    """Of choice 0; `seed` is the one in force."""

    max_unread: int | None
    """Chunks that may lie unread before the request is given up as too slow; None: any number."""

    @property
    def has_unread(self) -> bool:
        """Whether the next chunk is there already."""
        ...

    def __aiter__(self) -> AsyncIterator[TokenChunk]:
        """Chunks until every choice has had its last one. Raises `EngineError` when the request dies."""
        ...


class EngineClient(Protocol):
    """What the text side may ask of an engine. All methods belong to one event loop."""

    @property
    def state(self) -> EngineState: ...

    @property
    def state_reason(self) -> str:
        """Why the engine is in its state, one line; empty when ready."""
        ...

    @property
    def info(self) -> EngineReady | None:
        """Resolved capacities; None until the model is loaded."""
        ...

    @property
    def num_restarts(self) -> int:
        """How often the engine died and was started again."""
        ...

    @property
    def retry_after_s(self) -> float:
        """When a request that finds no place now may find one, by the rate at which others end."""
        ...

    async def submit(self, request: GenerateRequest) -> RequestStream:
        """Hand a request over and wait until it holds a running slot.

        Raises `Overloaded`, `InvalidRequest` or another `EngineError` when it is refused. If the
        awaiting task is cancelled, so is the request.
        """
        ...

    async def embed(self, request: EmbedRequest) -> Awaitable[Embedded]:
        """Hand a request over and wait until it holds a running slot; raises and is cancelled as `submit`.

        What is returned is awaited once, for the vectors. That raises `EngineError` when the request
        dies; whoever does not wait for it to the end cancels the request.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Free everything that the request holds, within one step. Unknown ids are ignored."""
        ...

    def cancel_choice(self, request_id: str, choice: int) -> None:
        """End one choice early: its text is complete. No further chunk of it need be read."""
        ...

    async def stats(self) -> EngineStats: ...

    async def dump_state(self) -> bytes:
        """What the engine is busy with, as a JSON object without content."""
        ...

    async def flush(self) -> bool:
        """Empty the prefix cache, unless requests run or wait. Returns whether it was emptied."""
        ...

    async def load_adapter(self, directory: str, is_pinned: bool = False) -> AdapterLoaded:
        """Read and check an adapter; the answer tells what it is, or why it cannot be used."""
        ...

    def unload_adapter(self, digest: str) -> None:
        """Throw an adapter out as soon as no request uses it. Unknown ones are ignored."""
        ...

    def unpin_adapter(self, digest: str) -> None:
        """Let an adapter make room for others again. Unknown ones are ignored."""
        ...

    async def close(self) -> None:
        """Stop the engine and wait until its process is gone."""
        ...
