"""GET /openapi.json and /docs: what this server answers, for programs and for people."""

from __future__ import annotations

from sanic import HTTPResponse, Sanic
from sanic.request import Request

from engine.server.context import ServerContext
from engine.server.json_response import json_response
from engine.server.openapi import document, page


def add_routes(app: Sanic, _context: ServerContext) -> None:
    described, shown = document(), page()

    @app.get("/openapi.json", name="openapi", ignore_body=True)
    async def openapi(_request: Request) -> HTTPResponse:
        return json_response(described)

    @app.get("/docs", ignore_body=True)
    async def docs(_request: Request) -> HTTPResponse:
        return HTTPResponse(shown, content_type="text/html; charset=utf-8")
