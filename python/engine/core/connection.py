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


class EngineConnection:
    """Messages to an engine and from it; to one process after the other. Belongs to one event loop."""

    def __init__(self) -> None:
        self._writer: asyncio.StreamWriter | None = None
        self._outbox = bytearray()
        self._flush_is_due = False

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
        """Queue a message; all of one turn of the loop go out together. To nobody, it is dropped.

        Raises: `FrameError` for one that does not encode; the others are not harmed.
        """
        if self._writer is None:
            return
        self._outbox += encode_frame([message])
        if not self._flush_is_due:
            self._flush_is_due = True
            asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        self._flush_is_due = False
        if self._outbox and self._writer is not None:
            self._writer.write(bytes(self._outbox))
            self._outbox.clear()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._outbox.clear()
