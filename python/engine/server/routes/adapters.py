"""POST /load_lora_adapter and /unload_lora_adapter, also under /v1."""

from __future__ import annotations

from typing import Any

from sanic import HTTPResponse, Sanic
from sanic.request import Request

from engine.errors import EngineError, InvalidRequest, NotFound
from engine.server.body import read_request
from engine.server.context import ServerContext
from engine.server.error_map import HttpError, to_http
from engine.server.fields import Fields
from engine.server.ignored import ignored_header
from engine.server.json_response import json_response
from engine.server.openapi_requests import REQUESTS
from engine.server.request_id import request_id_of


def add_routes(app: Sanic, context: ServerContext) -> None:
    @app.post("/load_lora_adapter", name="load_lora_adapter", stream=True)
    @app.post("/v1/load_lora_adapter", name="v1_load_lora_adapter", stream=True)
    async def load(request: Request) -> HTTPResponse:
        (name, path, is_pinned), ignored = await read_request(request, _parse_load)
        context.ignored.check(ignored, REQUESTS["LoadAdapterRequest"]["properties"])
        context.require_ready()
        try:
            await context.adapters.load(name, path, is_pinned)
        except (InvalidRequest, NotFound) as error:
            raise _refusal(context, request, error) from None
        return _answer(context, ignored)

    @app.post("/unload_lora_adapter", name="unload_lora_adapter", stream=True)
    @app.post("/v1/unload_lora_adapter", name="v1_unload_lora_adapter", stream=True)
    async def unload(request: Request) -> HTTPResponse:
        name, ignored = await read_request(request, _parse_unload)
        context.ignored.check(ignored, REQUESTS["UnloadAdapterRequest"]["properties"])
        context.require_ready()
        try:
            await context.adapters.unload(name)
        except NotFound as error:
            raise _refusal(context, request, error) from None
        return _answer(context, ignored)


def _answer(context: ServerContext, ignored: list[str]) -> HTTPResponse:
    return json_response(_outcome(context, None), ignored_header(ignored))


def _refusal(context: ServerContext, request: Request, error: EngineError) -> HttpError:
    """An error like any other, which also has the fields by which clients of these routes know it."""
    found = to_http(error, request_id_of(request))
    outcome = _outcome(context, error.message)
    return HttpError(400, found.kind, found.slug, found.message, param=found.param, beside=outcome)


def _outcome(context: ServerContext, error: str | None) -> dict[str, Any]:
    return {"success": error is None, "error_message": error, "loaded_adapters": context.adapters.paths}


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
