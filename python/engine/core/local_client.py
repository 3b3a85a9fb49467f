"""An engine in this process and this event loop: for tests, and where a process of its own is too much."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable

from engine.core.client import EngineState
from engine.core.engine_core import EngineCore
from engine.core.messages import (
    AdapterLoaded,
    CancelChoice,
    CancelRequest,
    Embedded,
    EmbedRequest,
    EngineReady,
    EngineStats,
    GenerateRequest,
    LoadAdapter,
    UnloadAdapter,
    UnpinAdapter,
)
from engine.core.streams import StreamTable, TokenStream
from engine.errors import InternalError, Overloaded

logger = logging.getLogger(__name__)


class LocalClient:
    """Implements `EngineClient`. A step blocks the loop; between two steps everybody has a turn."""

    def __init__(self, core: EngineCore, info: EngineReady) -> None:
        self.state = EngineState.READY
        self.state_reason = ""
        self.info: EngineReady | None = info
        self._core = core
        self._streams = StreamTable()
        self._loads: deque[asyncio.Future[AdapterLoaded]] = deque()
        self._stepping: asyncio.Task[None] | None = None
        self._watched: asyncio.AbstractEventLoop | None = None

    async def submit(self, request: GenerateRequest) -> TokenStream:
        if self.state is not EngineState.READY:
            raise Overloaded("The engine is shutting down.", slug="shutting_down")
        stream = self._streams.open(request)
        if self._watched is None and self._core.wake_fd is not None:
            self._watched = asyncio.get_running_loop()
            self._watched.add_reader(self._core.wake_fd, self._step_on)
        self._core.handle(request)
        self._step_on()
        try:
            await stream.admission
        except asyncio.CancelledError:
            self.cancel(request.request_id)
            raise
        return stream

    async def embed(self, request: EmbedRequest) -> Awaitable[Embedded]:
        if self.state is not EngineState.READY:
            raise Overloaded("The engine is shutting down.", slug="shutting_down")
        answer = self._streams.open_embedding(request)
        self._core.handle(request)
        self._step_on()
        try:
            await answer.admission
        except asyncio.CancelledError:
            self.cancel(request.request_id)
            raise
        return answer.result

    def cancel(self, request_id: str) -> None:
        if self._streams.cancel(request_id):
            self._core.handle(CancelRequest(request_id))

    def cancel_choice(self, request_id: str, choice: int) -> None:
        if self._streams.cancel_choice(request_id, choice):
            self._core.handle(CancelChoice(request_id, choice))

    async def stats(self) -> EngineStats:
        return self._core.stats()

    async def dump_state(self) -> bytes:
        return self._core.dump_state()

    async def flush(self) -> bool:
        return self._core.flush()

    async def load_adapter(self, directory: str, is_pinned: bool = False) -> AdapterLoaded:
        self._loads.append(asyncio.get_running_loop().create_future())
        answer = self._loads[-1]
        self._core.handle(LoadAdapter(directory, is_pinned))
        self._step_on()
        return await answer

    def unload_adapter(self, digest: str) -> None:
        self._core.handle(UnloadAdapter(digest))

    def unpin_adapter(self, digest: str) -> None:
        self._core.handle(UnpinAdapter(digest))

    async def close(self) -> None:
        self.state, self.state_reason = EngineState.DRAINING, "the engine is closed"
        if self._stepping is not None:
            self._stepping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._stepping
        self._streams.fail_all(Overloaded("The engine is shutting down.", slug="shutting_down"))
        if self._watched is not None and self._core.wake_fd is not None:
            self._watched.remove_reader(self._core.wake_fd)
        self._core.close()

    def _step_on(self) -> None:
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.create_task(self._step_until_idle())

    async def _step_until_idle(self) -> None:
        try:
            while True:
                messages = self._core.step()
                self._streams.dispatch(messages)
                for message in messages:
                    if isinstance(message, AdapterLoaded) and not (answer := self._loads.popleft()).done():
                        answer.set_result(message)
                if not self._core.has_work:
                    return
                await asyncio.sleep(0)
        except Exception as error:
            logger.exception("the engine failed")
            self.state, self.state_reason = EngineState.FAILED, f"the engine failed: {type(error).__name__}"
            self._streams.fail_all(InternalError("The engine failed."))
