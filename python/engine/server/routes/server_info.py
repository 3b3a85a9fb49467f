"""GET /, /version, /server_info and its other name /get_server_info: what this server is."""

from __future__ import annotations

import dataclasses
from typing import Any

from sanic import HTTPResponse, Sanic
from sanic.request import Request

import engine
from engine.server.context import ServerContext
from engine.server.json_response import json_response
from engine.server.load import Load, fetch_load
from engine.server.routes.models import model_info

_LINKS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "embeddings": "/v1/embeddings",
    "models": "/v1/models",
    "health": "/health",
    "server_info": "/server_info",
    "loads": "/v1/loads",
    "metrics": "/metrics",
    "docs": "/docs",
    "openapi": "/openapi.json",
}


def add_routes(app: Sanic, context: ServerContext) -> None:
    @app.get("/", name="root", ignore_body=True)
    async def root(_request: Request) -> HTTPResponse:
        error = context.unready
        status = "ready" if error is None else error.slug
        return json_response(
            {"name": "engine", "version": engine.__version__, "status": status, "links": _LINKS}
        )

    @app.get("/version", ignore_body=True)
    async def version(_request: Request) -> HTTPResponse:
        return json_response({"version": engine.__version__})

    @app.get("/server_info", name="server_info", ignore_body=True)
    @app.get("/get_server_info", name="get_server_info", ignore_body=True)
    async def server_info(request: Request) -> HTTPResponse:
        info = _info(context, await fetch_load(context))
        return json_response(info | {"port": request.conn_info.server_port})


def _internal_state(context: ServerContext) -> dict[str, Any]:
    """Where SGLang's bench tools look for how much they may ask at once."""
    _, ready = context.require_ready()
    return {
        "effective_max_running_requests_per_dp": ready.max_running_requests,
        "memory_usage": {"token_capacity": ready.max_total_tokens},
    }


def _info(context: ServerContext, load: Load) -> dict[str, Any]:
    """Never keys: only what is named here is shown."""
    config = context.config
    return {
        **model_info(context),
        "host": config.host,
        "needs_api_key": bool(config.api_key),
        "sampling_defaults": config.sampling_defaults,
        "allow_any_model_name": config.allow_any_model_name,
        "strict_params": config.strict_params,
        "error_format": config.error_format,
        "stream_interval": config.stream_interval,
        "log_level": config.log_level,
        "max_total_num_tokens": load.max_total_num_tokens,
        "load": dataclasses.asdict(load),
        "internal_states": [_internal_state(context)],
        "state": context.client.state.value,
    }
