"""Requests that name adapters, and calls that load and unload them."""

from __future__ import annotations

from typing import Any

import httpx

from helpers.http_server import Server

BASE = "org/base:7b"
INPUTS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/embeddings": {"input": "Hi"},
    "/v1/rerank": {"query": "Hi", "documents": ["a", "b"]},
    "/v1/score": {"text_1": "Hi", "text_2": "a"},
}


def digests(server: Server) -> list[str | None]:
    """Of the adapters of all requests so far, shortened."""
    requests = server.call(lambda: [*server.engine.submitted, *server.engine.embedded])
    return [r.adapter and r.adapter.directory.split("/")[-1] for r in requests]


def load(server: Server, name: str, path: Any, **fields: Any) -> httpx.Response:
    return server.post("/load_lora_adapter", {"lora_name": name, "lora_path": str(path), **fields})


def unload(server: Server, name: str, route: str = "/unload_lora_adapter") -> httpx.Response:
    return server.post(route, {"lora_name": name})
