"""GET /health: whether the server can generate, answered from flags alone."""

from __future__ import annotations

from sanic import HTTPResponse, Sanic
from sanic.request import Request

from engine.server.context import ServerContext


def add_routes(app: Sanic, context: ServerContext) -> None:
    @app.get("/health", ignore_body=True)
    async def health(_request: Request) -> HTTPResponse:
        if (error := context.unready) is not None:
            raise error
        return HTTPResponse(b'{"status":"ok"}', content_type="application/json")
