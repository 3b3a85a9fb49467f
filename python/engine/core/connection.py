"""The server's end of the socket to an engine process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator

from engine.core.frames import FrameError, FrameReader, encode_frame
from engine.core.messages import ToEngine, ToServer

logger = logging.getLogger(__name__)

_READ_BYTES = 1 << 20
_HOLD_S = 0.001
"""Messages wait that long at most for others of the same turn of the loop."""


class EngineConnection:
    """Messages to an engine and from it; to one process after the other. Belongs to one event loop."""

    def __init__(self) -> None:
        self._writer: asyncio.StreamWriter | None = None
        self._outbox = bytearray()
        self._flush_is_due = False
        self._flushed_s = 0.0

    async def receive(self, end: socket.socket) -> AsyncIterator[list[ToServer]]:
        """Open the connection, and give what the engine says, until it is gone or makes no sense."""
        end.setblocking(False)
        reader, self._writer = await asyncio.open_connection(sock=end)
        frames = FrameReader(ToServer)
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(_READ_BYTES):
                try:
                    messages = frames.feed(data)
                except FrameError as error:
                    logger.error("the engine talks nonsense: %s", error)
                    return
                yield messages

    def send(self, message: ToEngine) -> None:
        """Queue a message; those of one turn of the loop go out together, unless it takes long: of many
        requests that arrive at once the engine computes the first while the others are read. To nobody, it
        is dropped.

        Raises: `FrameError` for one that does not encode; the others are not harmed.
        """
        if self._writer is None:
            return
        self._outbox += encode_frame([message])
        loop = asyncio.get_running_loop()
        if loop.time() - self._flushed_s >= _HOLD_S:
            self.flush()
        elif not self._flush_is_due:
            self._flush_is_due = True
            loop.call_soon(self._flush_now)

    def _flush_now(self) -> None:
        self._flush_is_due = False
        self.flush()

    def flush(self) -> None:
        self._flushed_s = asyncio.get_running_loop().time()
        if self._outbox and self._writer is not None:
            self._writer.write(bytes(self._outbox))
            self._outbox.clear()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._outbox.clear()
