"""The Sanic application: what holds for every route, and one line for each route file."""

from __future__ import annotations

import math
from typing import Any

from sanic import HTTPResponse, Sanic
from sanic.handlers import ErrorHandler
from sanic.request import Request

from engine.config.limits import Limits
from engine.server.auth import Keyring, is_admin_path
from engine.server.context import ServerContext
from engine.server.cors import AllowedOrigins
from engine.server.error_map import CLIENT_CLOSED, to_http
from engine.server.metrics import Metrics
from engine.server.request_id import HEADER, request_id_of
from engine.server.request_log import endpoint_of, log_of
from engine.server.routes import (
    abort,
    adapters,
    cache,
    chat,
    completions,
    debug,
    docs,
    embeddings,
    generate,
    health,
    loads,
    metrics,
    models,
    rerank,
    server_info,
    tokenize,
)

ROUTES = (
    health,
    models,
    server_info,
    loads,
    metrics,
    chat,
    completions,
    generate,
    embeddings,
    rerank,
    tokenize,
    cache,
    abort,
    adapters,
    debug,
    docs,
)


def create_app(context: ServerContext) -> Sanic:
    """The application of one server. Its name is not registered, so a process may have several."""
    app = _App(
        "engine",
        configure_logging=False,
        env_prefix="",
        error_handler=_ErrorHandler(context.metrics, context.config.error_format),
        request_class=_Request,
    )
    Sanic.unregister_app(app)
    app.ctx.server = context
    app.config.update(_framework_config(context.limits))
    keyring = Keyring(context.config.keys, context.config.admin_api_key)
    origins = AllowedOrigins(context.config.allowed_origins)

    # Runs for unknown routes too, and before any body is read.
    @app.on_request
    async def check_key(request: Request) -> None:
        # Without a head it is the framework's own, made up to refuse what could not be read.
        if not request.head or origins.is_preflight(request):
            return
        log_of(request)
        request.ctx.end = context.metrics.begin_request(endpoint_of(request.route), request.method)
        client = request.ctx.client = keyring.client_of(request)
        if client.limits is not None and request.method == "POST" and not is_admin_path(request):
            client.limits.take_request()

    @app.on_response
    async def add_headers(request: Request, response: HTTPResponse) -> None:
        response.headers[HEADER] = request_id_of(request)
        if context.is_draining and request.stream is not None:
            request.stream.keep_alive = False
        origins.add_headers(request, response)
        client = getattr(request.ctx, "client", None)
        if client is not None and client.limits is not None:
            response.headers.update(client.limits.headers())

    @app.on_response
    async def count(request: Request, response: HTTPResponse) -> None:
        endpoint = endpoint_of(request.route)
        context.metrics.count_response(endpoint, request.method, response.status)
        log = log_of(request)
        if not log.is_later:
            log.write(endpoint, response.status)

    for routes in ROUTES:
        routes.add_routes(app, context)
    origins.add_preflights(app)
    return app


def _framework_config(limits: Limits) -> dict[str, Any]:
    return {
        "ACCESS_LOG": False,
        "AUTO_EXTEND": False,
        "MOTD": False,
        "KEEP_ALIVE_TIMEOUT": limits.idle_s,
        # Headers must arrive in this time; bodies are timed in body.py.
        "REQUEST_TIMEOUT": limits.receive_s,
        # An answer may take as long as it takes; a reader that stops reading is found in sse.py.
        "RESPONSE_TIMEOUT": math.inf,
        "GRACEFUL_TCP_CLOSE_TIMEOUT": min(5.0, limits.send_s),
        "REQUEST_MAX_SIZE": limits.body_bytes,
        "REQUEST_MAX_HEADER_SIZE": limits.header_bytes,
    }


class _App(Sanic):
    """Answers HEAD wherever it answers GET; the framework leaves the body out."""

    def get(self, uri: str, **options: Any) -> Any:
        return self.route(uri, methods=("GET", "HEAD"), **options)

    async def handle_request(self, request: Request) -> None:
        """Also knows when it is over, streams and lost connections included."""
        try:
            await super().handle_request(request)
        finally:
            if (end := getattr(request.ctx, "end", None)) is not None:
                end()


class _Request(Request):
    """A request whose target may be nonsense: without this the refusal of one fails as the request did."""

    __slots__ = ()

    def __init__(self, url_bytes: bytes, headers: Any, version: str, method: str, *args: Any, **kwargs: Any):
        if method == "NONE":  # made up by the framework, to have something to refuse
            url_bytes = b"*"
        super().__init__(url_bytes, headers, version, method, *args, **kwargs)


class _ErrorHandler(ErrorHandler):
    """Gives every error, of ours and of the framework, the one body."""

    def __init__(self, metrics: Metrics, error_format: str) -> None:
        super().__init__()
        self._metrics, self._error_format = metrics, error_format

    def default(self, request: Request, exception: Exception) -> HTTPResponse:
        error = to_http(exception, request_id_of(request))
        log_of(request).code = error.slug
        if request.method == "POST" and error.status not in (CLIENT_CLOSED, 500):
            self._metrics.count_rejection(error.slug)
        return HTTPResponse(error.body(self._error_format), error.status, error.headers, "application/json")
