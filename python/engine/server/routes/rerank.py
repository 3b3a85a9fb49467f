"""POST /v1/rerank and /v1/score, and the same without /v1: how well texts fit a query."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from sanic import HTTPResponse, Sanic
from sanic.request import Request

from engine.core.embedding_io import EmbeddingIO
from engine.server.answer import new_response_id
from engine.server.body import read_request
from engine.server.context import ServerContext
from engine.server.embedding import MAX_INPUTS, check_lora_path, compute_vectors
from engine.server.fields import Fields, json_type
from engine.server.ignored import ignored_header
from engine.server.json_response import json_response
from engine.server.openapi_requests import REQUESTS
from engine.server.schema import ignored_names, model_of, read_rid, read_user


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringRequest:
    """Pairs to score. `top_n` and `returns_documents` are for ranking only."""

    model: str
    pairs: list[tuple[str, str]]
    lora_path: str | None
    rid: str | None
    user: str | None
    top_n: int | None = None
    returns_documents: bool = True
    ignored: tuple[str, ...] = ()


def add_routes(app: Sanic, context: ServerContext) -> None:
    @app.post("/v1/rerank", name="v1_rerank", stream=True)
    @app.post("/rerank", name="rerank", stream=True)
    async def rerank(request: Request) -> HTTPResponse:
        embedding = context.require_embedding()
        asked = await read_request(
            request, lambda body: _parse(context, embedding, body, _parse_rerank, "RerankRequest")
        )
        response_id = new_response_id("rerank")
        scores, num_tokens = await _score(context, request, embedding, asked, response_id)
        return json_response(_ranking(asked, response_id, scores, num_tokens), ignored_header(asked.ignored))

    @app.post("/v1/score", name="v1_score", stream=True)
    @app.post("/score", name="score", stream=True)
    async def score(request: Request) -> HTTPResponse:
        embedding = context.require_embedding()
        asked = await read_request(
            request, lambda body: _parse(context, embedding, body, _parse_score, "ScoreRequest")
        )
        response_id = new_response_id("score")
        scores, num_tokens = await _score(context, request, embedding, asked, response_id)
        content = {
            "id": response_id,
            "object": "list",
            "created": int(time.time()),
            "model": asked.model,
            "data": [{"index": i, "object": "score", "score": score} for i, score in enumerate(scores)],
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }
        return json_response(content, ignored_header(asked.ignored))


def _parse(
    context: ServerContext, embedding: EmbeddingIO, body: dict[str, Any], parse: Any, schema: str
) -> ScoringRequest:
    context.names.check_embedding(model_of(body))
    fields = Fields(body)
    asked = parse(fields)
    check_lora_path(embedding, asked.lora_path)
    asked = dataclasses.replace(asked, ignored=ignored_names(fields))
    context.ignored.check(asked.ignored, REQUESTS[schema]["properties"])
    return asked


def _parse_rerank(fields: Fields) -> ScoringRequest:
    """The form of Jina's and Cohere's APIs. Raises `InvalidRequest` naming the field."""
    fields.require("query")
    fields.require("documents")
    query = fields.text("query") or ""
    if not query:
        raise fields.fail("query", "cannot be empty")
    documents = [_document(fields, item) for item in fields.items("documents")]
    _check_count(fields, "documents", len(documents))
    top_n = fields.integer("top_n")
    if top_n is not None and top_n < 1:
        raise fields.fail("top_n", f"must be at least 1, got {top_n}")
    return ScoringRequest(
        model=fields.text("model") or "",
        pairs=[(query, document) for document in documents],
        lora_path=fields.text("lora_path"),
        rid=read_rid(fields),
        user=read_user(fields),
        top_n=top_n,
        returns_documents=fields.boolean("return_documents", default=True),
    )


def _parse_score(fields: Fields) -> ScoringRequest:
    """vLLM's form: one text against many, or two lists of equal length. Raises `InvalidRequest`."""
    fields.require("text_1")
    fields.require("text_2")
    first, second = fields.texts("text_1"), fields.texts("text_2")
    for name, texts in (("text_1", first), ("text_2", second)):
        _check_count(fields, name, len(texts))
        if not all(texts):
            raise fields.fail(name, "cannot be empty")
    if len(first) != len(second) and len(first) != 1:
        raise fields.fail(
            "text_1", f"must be one text, or as many as text_2 has ({len(second)}), got {len(first)}"
        )
    if len(first) == 1:
        first *= len(second)
    return ScoringRequest(
        model=fields.text("model") or "",
        pairs=list(zip(first, second, strict=True)),
        lora_path=fields.text("lora_path"),
        rid=read_rid(fields),
        user=read_user(fields),
    )


def _document(fields: Fields, item: Any) -> str:
    """A text, or an object with one."""
    text = item.get("text") if isinstance(item, dict) else item
    if not isinstance(text, str):
        raise fields.fail("documents", f"must hold texts, got {json_type(item)}")
    if not text:
        raise fields.fail("documents", "may not hold an empty text")
    return text


def _check_count(fields: Fields, name: str, count: int) -> None:
    if not 1 <= count <= MAX_INPUTS:
        raise fields.fail(name, f"must hold 1 to {MAX_INPUTS} texts, got {count}")


async def _score(
    context: ServerContext, http: Request, embedding: EmbeddingIO, asked: ScoringRequest, response_id: str
) -> tuple[list[float], int]:
    """The score of each pair, and the tokens that were read for them.

    A cross-encoder reads the pairs; the vectors of another model are compared by the
    measure that its checkpoint names, cosines where it names none.
    """
    starts: Sequence[int] = ()
    if embedding.info.scores_pairs:
        texts, starts = await asyncio.to_thread(embedding.encode_pairs, asked.pairs)
        order: dict[str, int] = {}
    else:
        order = {text: i for i, text in enumerate(dict.fromkeys(t for pair in asked.pairs for t in pair))}
        texts = await asyncio.to_thread(embedding.encode, list(order))
    vectors = await compute_vectors(context, http, embedding, asked, texts, response_id, starts)
    num_tokens = sum(map(len, texts))
    if embedding.info.scores_pairs:
        return vectors[:, 0].tolist(), num_tokens
    return embedding.likenesses(vectors, [(order[a], order[b]) for a, b in asked.pairs]), num_tokens


def _ranking(asked: ScoringRequest, response_id: str, scores: list[float], num_tokens: int) -> dict[str, Any]:
    """Best first; of equal scores the earlier document first."""
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[: asked.top_n]
    results = []
    for i in best:
        result: dict[str, Any] = {"index": i, "relevance_score": scores[i]}
        if asked.returns_documents:
            result["document"] = {"text": asked.pairs[i][1]}
        results.append(result)
    return {
        "id": response_id,
        "model": asked.model,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        "results": results,
    }
