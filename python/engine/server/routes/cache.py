"""GET or POST /flush_cache: empty the prefix cache."""

from __future__ import annotations

import asyncio
import math

from sanic import HTTPResponse, Sanic
from sanic.request import Request

from engine.errors import InvalidRequest, Overloaded
from engine.server.context import ServerContext
from engine.server.error_map import INVALID, HttpError
from engine.server.json_response import json_response

MAX_WAIT_S = 60.0
ANSWER_S = 5.0
_POLL_S = 0.02


def add_routes(app: Sanic, context: ServerContext) -> None:
    @app.route("/flush_cache", methods=("GET", "POST"), ignore_body=True)
    async def flush_cache(request: Request) -> HTTPResponse:
        """?timeout=SECONDS waits so long for the engine to be idle."""
        wait_s = _wait_s(request.get_args(keep_blank_values=True).get("timeout", "0"))
        context.require_ready()
        try:
            async with asyncio.timeout(wait_s + ANSWER_S):
                was_flushed = await _flush(context, wait_s)
        except TimeoutError:
            raise Overloaded("The engine does not answer in time.", slug="queue_timeout") from None
        if not was_flushed:
            message = "The cache was not flushed: requests are running or waiting."
            raise HttpError(400, INVALID, "requests_running", message)
        return json_response({"status": "ok", "message": "The cache was flushed."})


async def _flush(context: ServerContext, wait_s: float) -> bool:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + wait_s
    while not await context.client.flush():
        if loop.time() >= deadline:
            return False
        await asyncio.sleep(_POLL_S)
    return True


def _wait_s(text: str) -> float:
    try:
        wait_s = float(text)
    except ValueError:
        wait_s = math.nan
    if not 0 <= wait_s <= MAX_WAIT_S:
        raise InvalidRequest(f"timeout must be in [0, {MAX_WAIT_S:g}] seconds", param="timeout")
    return wait_s
