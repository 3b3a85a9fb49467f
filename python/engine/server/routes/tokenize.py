"""POST /tokenize and /detokenize, and the same under /v1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sanic import HTTPResponse, Sanic
from sanic.request import Request

from engine.server.body import read_request, run_sized
from engine.server.context import ServerContext
from engine.server.fields import Fields
from engine.server.generation import cut_left, encode
from engine.server.ignored import ignored_header
from engine.server.json_response import json_response
from engine.server.model_files import ModelFiles
from engine.server.openapi_requests import REQUESTS
from engine.server.routes import chat
from engine.server.schema import MAX_PROMPTS, token_ids


def add_routes(app: Sanic, context: ServerContext) -> None:
    @app.post("/tokenize", name="tokenize", stream=True)
    @app.post("/v1/tokenize", name="v1_tokenize", stream=True)
    async def tokenize(request: Request) -> HTTPResponse:
        model, ready = context.require_ready()
        body = await read_request(request, lambda body: body)
        work = _tokenize_chat if body.get("messages") is not None else _tokenize_text
        return await run_sized(request, lambda: work(context, model, ready.context_length, body))

    @app.post("/detokenize", name="detokenize", stream=True)
    @app.post("/v1/detokenize", name="v1_detokenize", stream=True)
    async def detokenize(request: Request) -> HTTPResponse:
        model, _ = context.require_ready()
        body = await read_request(request, lambda body: body)
        return await run_sized(request, lambda: _detokenize(context, model, body))


def _tokenize_chat(
    context: ServerContext, model: ModelFiles, context_length: int, body: dict[str, Any]
) -> HTTPResponse:
    """The prompt that the same body would make as a chat request."""
    fields = Fields(body)
    if fields.raw("prompt") is not None:
        raise fields.fail("prompt", "may not be given together with messages")
    add_special_tokens = fields.boolean("add_special_tokens")
    rest = {name: value for name, value in body.items() if name not in ("prompt", "add_special_tokens")}
    if rest.get("model") is None:
        rest["model"] = context.names.primary
    asked = chat.parse(context, model, rest)
    text = chat.render_prompt(model, asked)
    whole = chat.encode_prompt(model, text, context_length, add_special_tokens=add_special_tokens)
    tokens = cut_left(whole, asked, context_length)
    return _tokens(tokens, len(tokens), context_length, asked.ignored)


def _tokenize_text(
    context: ServerContext, model: ModelFiles, context_length: int, body: dict[str, Any]
) -> HTTPResponse:
    fields = Fields(body)
    _check_model(context, fields)
    fields.require("prompt")
    is_list = isinstance(fields.peek("prompt"), list)
    prompts = fields.texts("prompt")
    add_special_tokens = fields.boolean("add_special_tokens", default=True)
    context.ignored.check(fields.unread(), REQUESTS["TokenizeRequest"]["properties"])
    if len(prompts) > MAX_PROMPTS:
        raise fields.fail("prompt", f"may hold at most {MAX_PROMPTS} prompts, got {len(prompts)}")
    tokens = [
        encode(model.tokenizer, prompt, context_length, add_special_tokens=add_special_tokens)
        for prompt in prompts
    ]
    counts = [len(ids) for ids in tokens]
    if is_list:
        return _tokens(tokens, counts, context_length, fields.unread())
    return _tokens(tokens[0], counts[0], context_length, fields.unread())


def _tokens(tokens: Any, count: Any, context_length: int, ignored: Sequence[str]) -> HTTPResponse:
    content = {"tokens": tokens, "count": count, "max_model_len": context_length}
    return json_response(content, ignored_header(ignored))


def _detokenize(context: ServerContext, model: ModelFiles, body: dict[str, Any]) -> HTTPResponse:
    fields = Fields(body)
    _check_model(context, fields)
    fields.require("tokens")
    tokens = fields.items("tokens")
    skips = fields.boolean("skip_special_tokens", default=True)
    context.ignored.check(fields.unread(), REQUESTS["DetokenizeRequest"]["properties"])
    text: str | list[str]
    if tokens and isinstance(tokens[0], list):
        lists = [token_ids(fields, "tokens", ids, model.vocab_size) for ids in tokens]
        text = [model.tokenizer.decode(ids, skips) for ids in lists]
    else:
        text = model.tokenizer.decode(token_ids(fields, "tokens", tokens, model.vocab_size), skips)
    return json_response({"text": text}, ignored_header(fields.unread()))


def _check_model(context: ServerContext, fields: Fields) -> None:
    if (name := fields.text("model")) is not None:
        context.names.check(name)
