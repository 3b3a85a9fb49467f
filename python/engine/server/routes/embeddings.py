"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import numpy as np
from sanic import HTTPResponse, Sanic
from sanic.request import Request

from engine.core.embedding_io import EmbeddingIO
from engine.errors import InvalidRequest
from engine.server.answer import new_response_id
from engine.server.body import read_request
from engine.server.context import ServerContext
from engine.server.embedding import EmbeddingRequest, check_lora_path, compute_vectors, parse_embedding
from engine.server.ignored import ignored_header
from engine.server.openapi_requests import REQUESTS
from engine.server.schema import model_of

T = TypeVar("T")

_INLINE_CHARS = 8192
_INLINE_NUMBERS = 16384


def add_routes(app: Sanic, context: ServerContext) -> None:
    writing = (
        asyncio.Lock()
    )  # one large answer at a time: what many take together is known once they are sent

    @app.post("/v1/embeddings", stream=True)
    async def embeddings(request: Request) -> HTTPResponse:
        embedding = context.require_embedding()
        asked = await read_request(request, lambda body: _parse(context, embedding, body))
        texts = await _run(
            sum(map(len, asked.inputs)) <= _INLINE_CHARS,
            lambda: embedding.encode(asked.inputs, asked.prompt_name),
        )
        num_tokens = sum(map(len, texts))
        vectors = await compute_vectors(context, request, embedding, asked, texts, new_response_id("embd"))
        if vectors.size <= _INLINE_NUMBERS:
            content = _body(embedding, asked, vectors, num_tokens)
        else:
            async with writing:
                content = await asyncio.to_thread(_body, embedding, asked, vectors, num_tokens)
        return HTTPResponse(content, headers=ignored_header(asked.ignored), content_type="application/json")


def _parse(context: ServerContext, embedding: EmbeddingIO, body: dict[str, Any]) -> EmbeddingRequest:
    context.names.check_embedding(model_of(body))
    if embedding.info.scores_pairs:
        raise InvalidRequest(
            f"the model {model_of(body)!r} scores pairs of texts; use /v1/rerank or /v1/score",
            slug="unsupported_parameter",
            param="model",
        )
    asked = parse_embedding(body, embedding.info.vocab_size)
    embedding.check_dimensions(asked.dimensions)
    check_lora_path(embedding, asked.lora_path)
    context.ignored.check(asked.ignored, REQUESTS["EmbeddingRequest"]["properties"])
    return asked


async def _run(is_small: bool, work: Callable[[], T]) -> T:
    """Small work here, the rest in a thread, so that others go on."""
    return work() if is_small else await asyncio.to_thread(work)


def _body(embedding: EmbeddingIO, asked: EmbeddingRequest, vectors: np.ndarray, num_tokens: int) -> bytes:
    vectors = np.ascontiguousarray(embedding.cut(vectors, asked.dimensions), "<f4")
    shown: list[Any]
    if asked.encoding_format == "base64":
        shown = [base64.b64encode(vector).decode() for vector in vectors]
    else:
        shown = vectors.tolist()
    return msgspec.json.encode(
        {
            "object": "list",
            "data": [{"object": "embedding", "index": i, "embedding": item} for i, item in enumerate(shown)],
            "model": asked.model,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }
    )
