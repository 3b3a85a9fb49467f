"""POST /abort_request: end a request from outside, by name, or all of them."""

from __future__ import annotations

from typing import Any

from sanic import HTTPResponse, Sanic
from sanic.request import Request

from engine.server.body import read_request
from engine.server.context import ServerContext
from engine.server.fields import Fields
from engine.server.ignored import ignored_header
from engine.server.json_response import json_response
from engine.server.openapi_requests import REQUESTS


def add_routes(app: Sanic, context: ServerContext) -> None:
    @app.post("/abort_request", stream=True)
    async def abort_request(request: Request) -> HTTPResponse:
        rid, ignored = await read_request(request, _parse)
        context.ignored.check(ignored, REQUESTS["AbortRequest"]["properties"])
        num_aborted = context.live.abort_all() if rid is None else context.live.abort(rid)
        return json_response({"aborted": num_aborted}, ignored_header(ignored))


def _parse(body: dict[str, Any]) -> tuple[str | None, list[str]]:
    """The name of one request, or None for all; and the fields that mean nothing."""
    fields = Fields(body)
    rid = fields.text("rid")
    if fields.boolean("abort_all"):
        return None, fields.unread()
    if not rid:
        raise fields.fail("rid", "is required unless abort_all is true", slug="missing_required_parameter")
    return rid, fields.unread()
