"""GET /health and /ready, answered from flags alone, and /health_generate, which computes a token."""

from __future__ import annotations

import asyncio

from sanic import HTTPResponse, Sanic
from sanic.request import Request

from engine.errors import Overloaded
from engine.server.context import ServerContext
from engine.server.json_response import json_response
from engine.server.probe import compute_something

GENERATE_TIMEOUT_S = 20.0


def add_routes(app: Sanic, context: ServerContext) -> None:
    @app.get("/health", ignore_body=True)
    async def health(_request: Request) -> HTTPResponse:
        if (error := context.unready) is not None:
            raise error
        return json_response({"status": "ok"})

    @app.get("/ready", ignore_body=True)
    async def ready(_request: Request) -> HTTPResponse:
        if (error := context.unready) is not None:
            raise error
        return json_response({"status": "ready"})

    @app.get("/health_generate", ignore_body=True)
    async def health_generate(_request: Request) -> HTTPResponse:
        _, ready = context.require_ready()
        try:
            async with asyncio.timeout(GENERATE_TIMEOUT_S):
                await compute_something(context.client, ready)
        except TimeoutError:
            raise Overloaded(
                f"The engine made no token in {GENERATE_TIMEOUT_S:g} seconds.", slug="queue_timeout"
            ) from None
        return json_response({"status": "ok"})
