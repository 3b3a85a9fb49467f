"""The description of the API in OpenAPI 3.1, and a page for people made from it."""

from __future__ import annotations

import dataclasses
import html
from typing import Any

import engine
from engine.server.auth import ADMIN_PATHS, OPEN_PATHS
from engine.server.openapi_answers import ANSWERS, event
from engine.server.openapi_headers import (
    GENERATED,
    HEADERS,
    PARAMETERS,
    REQUEST_ID,
    SECURITY,
    STREAMED,
    of_answer,
    of_error,
)
from engine.server.openapi_requests import REQUESTS
from engine.server.openapi_words import NUMBER, TEXT, Schema, ref

_JSON = "application/json"
_ERRORS = {
    400: "The request is wrong as it is.",
    401: "No API key, or a wrong one.",
    403: "The API key is not the one that manages the server.",
    404: "There is no such model, adapter or path.",
    405: "The path has other methods; the header allow names them.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "Too much for the limits of this API key; the header retry-after says when.",
    500: "The server failed; its log tells more.",
    503: "Not now: overloaded, loading or shutting down; the header retry-after says when.",
}
_WITH_BODY = (400, 408, 413, 415, 503)

SCHEMAS: dict[str, Schema] = {**REQUESTS, **ANSWERS}


@dataclasses.dataclass(frozen=True)
class Operation:
    """One method of one path. `request` and `answer` name schemas; `media` are types of the answer."""

    path: str
    summary: str
    answer: str
    request: str | None = None
    errors: tuple[int, ...] = ()
    media: tuple[str, ...] = (_JSON,)
    parameters: tuple[tuple[str, str, Schema], ...] = ()
    """Place ("path" or "query"), name and schema of each."""

    events: str | None = None
    """Schema of each event, if the answer can be a stream of them."""

    headers: tuple[str, ...] = ()
    """Those that the answer may have besides those of every answer, and those of a stream."""

    method: str = "get"

    def described(self) -> dict[str, Any]:
        is_open = self.path in OPEN_PATHS
        errors = self.errors if is_open else (401, 500, *self.errors)
        if self.path in ADMIN_PATHS:
            errors += (403,)
        elif self.method == "post":  # as `create_app` counts them
            errors += (429,)
        schema = ref(self.answer) if self.answer in SCHEMAS else TEXT
        content = {media: {"schema": schema if media == _JSON else TEXT} for media in self.media}
        if self.events is not None:
            content[_EVENTS] = {"schema": event(self.events)}
        described: dict[str, Any] = {
            "operationId": f"{self.method}{self.path.translate(_ID_CHARS)}",
            "summary": self.summary,
            "parameters": [
                {"$ref": f"#/components/parameters/{REQUEST_ID}"},
                *(
                    {"in": place, "name": name, "required": place == "path", "schema": schema}
                    for place, name, schema in self.parameters
                ),
            ],
            "responses": {"200": self._answer(content)}
            | {str(status): {"$ref": f"#/components/responses/{status}"} for status in sorted(errors)},
        }
        if is_open:
            described["security"] = []
        if self.request is not None:
            body = {"required": True, "content": {_JSON: {"schema": ref(self.request)}}}
            described["requestBody"] = body
        return described

    def _answer(self, content: dict[str, Any]) -> dict[str, Any]:
        streamed = STREAMED if self.events is not None else ()
        headers = of_answer(*self.headers, *streamed)
        return {"description": "The answer.", "headers": headers, "content": content}


_ABOUT = (
    "GET routes but /flush_cache also answer HEAD. Unknown parameters of a query are ignored. Bodies are "
    "JSON in UTF-8; one with a content-encoding is refused with 415. /metrics and /v1/loads answer in the "
    "format of OpenMetrics where accept names it. With --allowed-origins every route answers the OPTIONS of "
    "a browser, which carries no key. A path that is not here is answered like components/responses/404, "
    "with the type not_found_error and the code route_not_found; a method that a path does not have like "
    "components/responses/405. Before any path is looked at, what is no HTTP gets 400, a head that is too "
    "large 413, one that does not come in time 408, and one connection too many 503, all with the same body."
)
_ID_CHARS = str.maketrans({"/": "_", "{": "", "}": "", ".": "_"})
_EVENTS = "text/event-stream"
_GENERATED = tuple(GENERATED)
_IGNORED = ("x-ignored-params",)
_WAIT = ("query", "timeout", {**NUMBER, "minimum": 0, "maximum": 60})


def _post(path: str, summary: str, request: str, answer: str, **more: Any) -> Operation:
    more = {"errors": _WITH_BODY, "headers": _IGNORED, **more}
    return Operation(path, summary, answer, request, method="post", **more)


def _generate(path: str, summary: str, request: str, answer: str, events: str) -> Operation:
    errors = (*_WITH_BODY, 404)
    return _post(path, summary, request, answer, errors=errors, events=events, headers=_GENERATED)


_TOKENIZE = (
    "Token ids of a text, of texts, or of a conversation with the fields of a chat request.",
    "TokenizeRequest",
    "Tokens",
)
_DETOKENIZE = ("The text of token ids.", "DetokenizeRequest", "Text")
_RERANK = ("Order documents by how well they fit a query.", "RerankRequest", "Ranking")
_SCORE = ("Say how well pairs of texts fit.", "ScoreRequest", "Scores")
_MODEL_INFO = ("The model and the resolved configuration.", "Info")
_SERVER_INFO = ("The model, the resolved configuration and the load.", "Info")
_LOAD_ADAPTER = (
    "Serve an adapter under a name, from a directory that --lora-dir or --lora-paths allows.",
    "LoadAdapterRequest",
    "AdapterUpdate",
)
_UNLOAD_ADAPTER = (
    "Forget an adapter; answered when its last request is over.",
    "UnloadAdapterRequest",
    "AdapterUpdate",
)
_FLUSH = "Empty the prefix cache, unless requests run; timeout waits for that, in seconds."

OPERATIONS = (
    _generate("/v1/chat/completions", "Answer a conversation.", "ChatRequest", "ChatCompletion", "ChatChunk"),
    _generate("/v1/completions", "Continue prompts.", "CompletionRequest", "Completion", "CompletionChunk"),
    _post(
        "/generate",
        "Continue prompts, in the form of SGLang's own API.",
        "GenerateRequest",
        "Generated",
        errors=(*_WITH_BODY, 404),
        events="GeneratedChunk",
        headers=("x-ignored-params", "x-seed", "x-default-max-tokens"),
    ),
    _post(
        "/v1/embeddings",
        "Turn texts, or lists of token ids, into vectors.",
        "EmbeddingRequest",
        "Embeddings",
        errors=(*_WITH_BODY, 404),
    ),
    *(_post(path, *_RERANK, errors=(*_WITH_BODY, 404)) for path in ("/v1/rerank", "/rerank")),
    *(_post(path, *_SCORE, errors=(*_WITH_BODY, 404)) for path in ("/v1/score", "/score")),
    Operation(
        "/v1/models", "The model under each of its names, and its adapters.", "ModelList", errors=(503,)
    ),
    Operation(
        "/v1/models/{model_id}",
        "One model; its id may hold slashes.",
        "Model",
        errors=(404, 503),
        parameters=(("path", "model_id", TEXT),),
    ),
    _post("/tokenize", *_TOKENIZE, errors=(*_WITH_BODY, 404)),
    _post("/v1/tokenize", *_TOKENIZE, errors=(*_WITH_BODY, 404)),
    _post("/detokenize", *_DETOKENIZE, errors=(*_WITH_BODY, 404)),
    _post("/v1/detokenize", *_DETOKENIZE, errors=(*_WITH_BODY, 404)),
    _post("/load_lora_adapter", *_LOAD_ADAPTER),
    _post("/v1/load_lora_adapter", *_LOAD_ADAPTER),
    _post("/unload_lora_adapter", *_UNLOAD_ADAPTER),
    _post("/v1/unload_lora_adapter", *_UNLOAD_ADAPTER),
    _post("/abort_request", "End a request by its rid, or all requests.", "AbortRequest", "Aborted"),
    Operation("/flush_cache", _FLUSH, "Flushed", errors=(400, 503), parameters=(_WAIT,)),
    Operation("/flush_cache", _FLUSH, "Flushed", errors=(400, 503), parameters=(_WAIT,), method="post"),
    Operation("/health", "Whether the server can generate, from flags alone.", "Status", errors=(503,)),
    Operation("/ready", "Whether the server takes requests.", "Status", errors=(503,)),
    Operation("/health_generate", "Whether a token comes, by making one.", "Status", errors=(503,)),
    Operation("/get_model_info", *_MODEL_INFO, errors=(503,)),
    Operation("/model_info", *_MODEL_INFO, errors=(503,)),
    Operation("/get_server_info", *_SERVER_INFO, errors=(503,)),
    Operation("/server_info", *_SERVER_INFO, errors=(503,)),
    Operation("/debug/state", "What server and engine are busy with, by id; no content.", "Info"),
    Operation(
        "/v1/loads",
        "How busy the engine is.",
        "Loads",
        errors=(400, 503),
        parameters=(("query", "format", {"type": "string", "enum": ["json", "prometheus"]}),),
        media=(_JSON, "text/plain", "application/openmetrics-text"),
    ),
    Operation(
        "/metrics",
        "Counters and latencies for Prometheus.",
        "",
        media=("text/plain", "application/openmetrics-text"),
    ),
    Operation("/version", "The version of this server.", "Version"),
    Operation("/openapi.json", "This description.", "Info"),
    Operation("/docs", "A page with the routes.", "", media=("text/html",)),
    Operation("/", "What runs here, and links.", "Root"),
)


def _error(status: int) -> dict[str, Any]:
    return {
        "description": _ERRORS[status],
        "headers": of_error(status),
        "content": {_JSON: {"schema": ref("Error")}},
    }


def document() -> dict[str, Any]:
    """The whole description."""
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = operation.described()
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "engine",
            "version": engine.__version__,
            "description": _ABOUT,
        },
        "paths": paths,
        "security": [*({name: []} for name in SECURITY), {}],
        "components": {
            "schemas": SCHEMAS,
            "responses": {str(status): _error(status) for status in _ERRORS},
            "headers": HEADERS,
            "parameters": PARAMETERS,
            "securitySchemes": SECURITY,
        },
    }


def page() -> str:
    """The routes and the fields of their requests, as HTML that needs nothing else."""
    sections = "".join(map(_section, OPERATIONS))
    return _PAGE.format(version=html.escape(engine.__version__), sections=sections)


def _section(operation: Operation) -> str:
    fields = SCHEMAS[operation.request]["properties"] if operation.request else {}
    names = ", ".join(f"<code>{html.escape(name)}</code>" for name in fields)
    return (
        f"<h2><code>{operation.method.upper()} {html.escape(operation.path)}</code></h2>\n"
        f"<p>{html.escape(operation.summary)}</p>\n" + (f"<p>Fields: {names}</p>\n" if names else "")
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>engine</title>
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem; }}
h2 {{ font-size: 1rem; margin: 1.5rem 0 0; }}
p {{ margin: 0; }}
</style>
</head>
<body>
<h1>engine {version}</h1>
<p>The same, with every field, for programs: <a href="openapi.json">openapi.json</a></p>
{sections}</body>
</html>
"""
