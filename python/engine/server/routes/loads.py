"""GET /v1/loads: how busy the engine is, for load balancers."""

from __future__ import annotations

import dataclasses
import time

from sanic import HTTPResponse, Sanic
from sanic.request import Request

import engine
from engine.errors import InvalidRequest
from engine.server.context import ServerContext
from engine.server.json_response import json_response
from engine.server.load import fetch_load
from engine.server.routes.metrics import load_families, written

FORMATS = ("json", "prometheus")


def add_routes(app: Sanic, context: ServerContext) -> None:
    @app.get("/v1/loads", ignore_body=True)
    async def loads(request: Request) -> HTTPResponse:
        wanted = request.get_args(keep_blank_values=True).get("format", "json")
        if wanted not in FORMATS:
            raise InvalidRequest(f"format must be json or prometheus, got {wanted!r:.40}", param="format")
        found = await fetch_load(context)
        if wanted == "prometheus":
            return written(load_families(found), request)
        load = dataclasses.asdict(found)
        return json_response(
            {
                "timestamp": time.time(),
                "version": engine.__version__,
                "dp_rank_count": 1,
                "loads": [{"dp_rank": 0, **load}],
                "aggregate": load,
            }
        )
