"""The Sanic application: what holds for every route, and one line for each route file."""

from __future__ import annotations

import asyncio
import math
import re
import socket
from typing import Any

from sanic import HTTPResponse, Sanic
from sanic.application.state import ApplicationServerInfo
from sanic.handlers import ErrorHandler
from sanic.http.constants import HTTP
from sanic.request import Request
from sanic.server.async_server import AsyncioServer
from sanic_routing.route import Route

from engine.server.auth import ApiKeys
from engine.server.body import MAX_BODY_BYTES
from engine.server.context import ServerContext
from engine.server.cors import AllowedOrigins
from engine.server.error_map import to_http
from engine.server.metrics import Metrics
from engine.server.request_id import HEADER, request_id_of
from engine.server.routes import (
    abort,
    cache,
    chat,
    completions,
    docs,
    health,
    loads,
    metrics,
    models,
    server_info,
    tokenize,
)

KEEP_ALIVE_TIMEOUT_S = 75
REQUEST_TIMEOUT_S = 60
BACKLOG = 1024
_DRAIN_POLL_S = 0.05

ROUTES = (health, models, server_info, loads, metrics, chat, completions, tokenize, cache, abort, docs)

_SANIC_CONFIG = {
    "ACCESS_LOG": False,
    "AUTO_EXTEND": False,
    "MOTD": False,
    "KEEP_ALIVE_TIMEOUT": KEEP_ALIVE_TIMEOUT_S,
    # Headers must arrive in this time; bodies have a limit of their own (body.py).
    "REQUEST_TIMEOUT": REQUEST_TIMEOUT_S,
    # An answer may take as long as it takes; a reader that stops reading is found in sse.py.
    "RESPONSE_TIMEOUT": math.inf,
    "REQUEST_MAX_SIZE": MAX_BODY_BYTES,
}


def create_app(context: ServerContext) -> Sanic:
    """The application of one server. Its name is not registered, so a process may have several."""
    app = Sanic(
        "engine",
        configure_logging=False,
        env_prefix="",
        error_handler=_ErrorHandler(context.metrics, context.config.error_format),
        request_class=_Request,
    )
    Sanic.unregister_app(app)
    app.config.update(_SANIC_CONFIG)
    keys = ApiKeys(context.config.api_key)
    origins = AllowedOrigins(context.config.allowed_origins)

    # Runs for unknown routes too, and before any body is read.
    @app.on_request
    async def check_key(request: Request) -> None:
        if not origins.is_preflight(request):
            keys.check(request)

    @app.on_response
    async def add_headers(request: Request, response: HTTPResponse) -> None:
        response.headers[HEADER] = request_id_of(request)
        origins.add_headers(request, response)

    @app.on_response
    async def count(request: Request, response: HTTPResponse) -> None:
        context.metrics.count_response(endpoint_of(request.route), request.method, response.status)

    for routes in ROUTES:
        routes.add_routes(app, context)
    origins.add_preflights(app)
    return app


class _Request(Request):
    """A request whose target may be nonsense: without this the refusal of one fails as the request did."""

    __slots__ = ()

    def __init__(self, url_bytes: bytes, headers: Any, version: str, method: str, *args: Any, **kwargs: Any):
        if method == "NONE":  # made up by the framework, to have something to refuse
            url_bytes = b"*"
        super().__init__(url_bytes, headers, version, method, *args, **kwargs)


def endpoint_of(route: Route | None) -> str:
    """The path of a route, with {names} in place of its parameters; "other" for no route of ours."""
    return "other" if route is None else "/" + re.sub(r"<(\w+)(:\w+)?>", r"{\1}", route.path)


class _ErrorHandler(ErrorHandler):
    """Gives every error, of ours and of the framework, the one body."""

    def __init__(self, metrics: Metrics, error_format: str) -> None:
        super().__init__()
        self._metrics, self._error_format = metrics, error_format

    def default(self, request: Request, exception: Exception) -> HTTPResponse:
        error = to_http(exception, request_id_of(request))
        if request.method == "POST" and error.status != 500:
            self._metrics.count_rejection(error.slug)
        return HTTPResponse(error.body(self._error_format), error.status, error.headers, "application/json")


async def start_serving(app: Sanic, listener: socket.socket) -> AsyncioServer:
    """Answer on a bound socket, in the running event loop."""
    # Connections inherit it. Without it the second token of a stream waits for the client's delayed
    # acknowledgement of the first, some 40 ms; asyncio sets it only on listeners that it made itself.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # Without this note about itself the framework sends an empty alt-svc header with every answer.
    app.state.server_info.append(ApplicationServerInfo(settings={"version": HTTP.VERSION_1}))
    server = await app.create_server(
        sock=listener, backlog=BACKLOG, asyncio_server_kwargs={"start_serving": False}
    )
    await server.startup()
    await server.start_serving()
    return server


async def drain(server: AsyncioServer, timeout_s: float) -> None:
    """Accept no more, and wait at most `timeout_s` seconds until running requests have ended."""
    server.close()
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while server.connections and loop.time() < deadline:
        for connection in list(server.connections):
            connection.close_if_idle()
        await asyncio.sleep(_DRAIN_POLL_S)


async def cut_off(server: AsyncioServer) -> None:
    """Close what is still open. Effects: handlers are cancelled, and with them their requests."""
    while server.connections:
        for connection in list(server.connections):
            connection.abort()
        await asyncio.sleep(0)
