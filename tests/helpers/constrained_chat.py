"""What tests ask for when an answer is constrained, over HTTP and with the SDK."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai

from helpers.http_server import DEADLINE_S
from helpers.server_process import ServerProcess

MODEL = "default"
MESSAGES = [{"role": "user", "content": "Tell me about a person, as JSON."}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"type": "string", "format": "email"},
    },
    "required": ["name", "age"],
}
SDK_FIELDS = {
    "response_format",
    "n",
    "stream",
    "logprobs",
    "top_logprobs",
    "max_tokens",
    "logit_bias",
    "seed",
}


def serve_compiling_for(timeout_s: int) -> Callable[[], Iterator[ServerProcess]]:
    """A fixture's body: the bundled model behind a server that tries a constraint for so long."""

    def serve() -> Iterator[ServerProcess]:
        with ServerProcess("--grammar-timeout", str(timeout_s)) as process:
            process.wait_ready()
            yield process

    return serve


def endless_regex(name: str) -> str:
    """One that is tried until it is stopped, and that nobody of another name asks for."""
    return f"({'|'.join(['a*'] * 2000)})*b{name}"


def json_schema(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **fields}}


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    extra = {name: fields.pop(name) for name in list(fields) if name not in SDK_FIELDS}
    fields = {"temperature": 1, "seed": 3, "max_tokens": 300} | fields
    return client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_body=extra, **fields)


def post(server: ServerProcess, **fields: Any) -> httpx.Response:
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 5, **fields}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=DEADLINE_S)
