"""POST /load_lora_adapter and /unload_lora_adapter, also under /v1."""

from __future__ import annotations

from typing import Any

from sanic import HTTPResponse, Sanic
from sanic.request import Request

from engine.errors import InvalidRequest, NotFound
from engine.server.body import read_request
from engine.server.context import ServerContext
from engine.server.fields import Fields
from engine.server.ignored import ignored_header
from engine.server.json_response import json_response
from engine.server.openapi_schemas import SCHEMAS


def add_routes(app: Sanic, context: ServerContext) -> None:
    @app.post("/load_lora_adapter", name="load_lora_adapter", stream=True)
    @app.post("/v1/load_lora_adapter", name="v1_load_lora_adapter", stream=True)
    async def load(request: Request) -> HTTPResponse:
        (name, path, is_pinned), ignored = await read_request(request, _parse_load)
        context.ignored.check(ignored, SCHEMAS["LoadAdapterRequest"]["properties"])
        context.require_ready()
        try:
            await context.adapters.load(name, path, is_pinned)
        except (InvalidRequest, NotFound) as error:
            return _answer(context, error.message)
        return _answer(context, None, ignored)

    @app.post("/unload_lora_adapter", name="unload_lora_adapter", stream=True)
    @app.post("/v1/unload_lora_adapter", name="v1_unload_lora_adapter", stream=True)
    async def unload(request: Request) -> HTTPResponse:
        name, ignored = await read_request(request, _parse_unload)
        context.ignored.check(ignored, SCHEMAS["UnloadAdapterRequest"]["properties"])
        context.require_ready()
        try:
            await context.adapters.unload(name)
        except NotFound as error:
            return _answer(context, error.message)
        return _answer(context, None, ignored)


def _answer(context: ServerContext, error: str | None, ignored: list[str] | None = None) -> HTTPResponse:
    body = {"success": error is None, "error_message": error, "loaded_adapters": context.adapters.paths}
    return json_response(body, ignored_header(ignored or []), status=200 if error is None else 400)


def _parse_load(body: dict[str, Any]) -> tuple[tuple[str, str, bool], list[str]]:
    fields = Fields(body)
    fields.require("lora_name")
    fields.require("lora_path")
    found = fields.text("lora_name") or "", fields.text("lora_path") or "", fields.boolean("pinned")
    return found, fields.unread()


def _parse_unload(body: dict[str, Any]) -> tuple[str, list[str]]:
    fields = Fields(body)
    fields.require("lora_name")
    return fields.text("lora_name") or "", fields.unread()
