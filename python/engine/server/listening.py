"""Connections: bounded in number and in what they may keep the server waiting for; and the end of serving."""

from __future__ import annotations

import asyncio
import socket
from asyncio.transports import Transport
from time import monotonic

from sanic import Sanic
from sanic.application.state import ApplicationServerInfo
from sanic.exceptions import RequestCancelled
from sanic.http.constants import HTTP, Stage
from sanic.server.async_server import AsyncioServer
from sanic.server.protocols.http_protocol import HttpProtocol

from engine.errors import Overloaded
from engine.server.byte_allowance import SMALL_BYTES
from engine.server.error_map import to_http

_DRAIN_POLL_S = 0.02


class Connection(HttpProtocol):
    """One client's connection. `app.ctx.server` is the `ServerContext`."""

    __slots__ = ()

    def connection_made(self, transport: Transport) -> None:
        self._http, self._time = None, monotonic()  # the framework does so a turn of the loop later
        super().connection_made(transport)
        most = self.app.ctx.server.limits.connections
        if len(self.connections) <= most:
            return
        staying = [c for c in self.connections if not c.transport.is_closing()]
        if len(staying) <= most:
            return
        if idle := [c for c in staying if c is not self and c.is_idle]:
            min(idle, key=lambda connection: connection._time).close()
        else:
            self.app.ctx.server.metrics.count_rejection("too_many_connections")
            message = "Too many connections are open."
            transport.write(
                _refusal(message, "too_many_connections", self.app.ctx.server.config.error_format)
            )
            transport.close()

    def data_received(self, data: bytes) -> None:
        began = self._time
        super().data_received(data)
        if self._http is not None and self._http.stage is Stage.REQUEST:
            self._time = began  # headers that come drop by drop do not get more time with every drop

    async def send(self, data: bytes) -> None:
        """As the framework's, but a client that does not take what was sent before is cut off in time.

        So that this holds within a large answer, too, it goes out in pieces. What waits of all large answers
        together is bounded: one too many is replaced by a refusal.
        """
        if len(data) <= SMALL_BYTES:
            await self._send_piece(data)
            return
        with self.app.ctx.server.answer_memory.share() as memory:
            if not memory.grow(len(data)):
                self._refuse_answer(data)
                return
            for begin in range(0, len(data), SMALL_BYTES):
                await self._send_piece(data[begin : begin + SMALL_BYTES])

    async def _send_piece(self, data: bytes) -> None:
        if not self._can_write.is_set():
            timer = self.loop.call_later(self.app.ctx.server.limits.send_s, self.transport.abort)
            try:
                await self._can_write.wait()
            finally:
                timer.cancel()
        if self.transport.is_closing():
            raise RequestCancelled
        self.transport.write(data)
        self._time = monotonic()

    def _refuse_answer(self, data: bytes) -> None:
        """Nothing is sent of it; the connection closes."""
        server = self.app.ctx.server
        server.metrics.count_rejection("answers_too_large")
        if not data.startswith(b"HTTP/"):  # within an answer nothing else can be said any more
            self.transport.abort()
            raise RequestCancelled
        message = "Too many large answers wait for their clients."
        self.transport.write(_refusal(message, "answers_too_large", server.config.error_format))
        if self._http is not None:
            self._http.keep_alive = False

    @property
    def is_idle(self) -> bool:
        """Between requests; what is still being received or answered is not."""
        return self._http is None or self._http.stage is Stage.IDLE

    @property
    def is_answering(self) -> bool:
        return self._http is not None and self._http.stage in (Stage.HANDLER, Stage.RESPONSE)


def _refusal(message: str, slug: str, error_format: str) -> bytes:
    error = to_http(Overloaded(message, slug=slug), "")
    body = error.body(error_format)
    headers = {
        **error.headers,
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
    }
    lines = ["HTTP/1.1 503 Service Unavailable", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def start_serving(app: Sanic, listener: socket.socket, backlog: int) -> AsyncioServer:
    """Answer on a bound socket, in the running event loop, which takes up to `backlog` connections a turn."""
    # Connections inherit it. Without it the second token of a stream waits for the client's delayed
    # acknowledgement of the first, some 40 ms; asyncio sets it only on listeners that it made itself.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # Without this note about itself the framework sends an empty alt-svc header with every answer.
    app.state.server_info.append(ApplicationServerInfo(settings={"version": HTTP.VERSION_1}))
    server = await app.create_server(
        sock=listener, backlog=backlog, protocol=Connection, asyncio_server_kwargs={"start_serving": False}
    )
    await server.startup()
    await server.start_serving()
    return server


async def drain(server: AsyncioServer, timeout_s: float) -> None:
    """Wait at most `timeout_s` seconds until no request is being answered.

    The port stays open meanwhile: who comes now is told by the routes, and not by a refused connection.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while loop.time() < deadline and any(connection.is_answering for connection in server.connections):
        await asyncio.sleep(_DRAIN_POLL_S)


async def cut_off(server: AsyncioServer, flush_s: float = 1.0) -> None:
    """Free the port and close what is open. Effects: handlers are cancelled, and with them their requests.

    Answers that are complete have `flush_s` seconds to be taken by their clients.
    """
    server.close()
    loop = asyncio.get_running_loop()
    deadline = loop.time() + flush_s
    while loop.time() < deadline and any(connection.is_idle for connection in server.connections):
        for connection in list(server.connections):
            connection.close_if_idle()
        await asyncio.sleep(_DRAIN_POLL_S)
    while server.connections:
        for connection in list(server.connections):
            connection.abort()
        await asyncio.sleep(0)
