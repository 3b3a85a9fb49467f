"""GET /debug/state: what server and engine are busy with, also while the engine does not answer."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from sanic import HTTPResponse, Sanic
from sanic.request import Request

from engine.errors import Overloaded
from engine.server.context import ServerContext
from engine.server.json_response import json_response

ANSWER_S = 5.0


def add_routes(app: Sanic, context: ServerContext) -> None:
    @app.get("/debug/state", ignore_body=True)
    async def debug_state(_request: Request) -> HTTPResponse:
        client = context.client
        server = {
            "state": client.state.value,
            "reason": client.state_reason,
            "is_draining": context.is_draining,
            "restarts": client.num_restarts,
            "live_requests": context.live.names(),
            "tasks": len(asyncio.all_tasks()),
            "large_body_bytes": context.body_memory.num_bytes,
            "large_answer_bytes": context.answer_memory.num_bytes,
            "retry_after_s": client.retry_after_s,
        }
        return json_response({"server": server, "engine": await _engine_state(context)})


async def _engine_state(context: ServerContext) -> Any:
    try:
        async with asyncio.timeout(ANSWER_S):
            return msgspec.Raw(await context.client.dump_state())
    except (Overloaded, TimeoutError):
        return None
