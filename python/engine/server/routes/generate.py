"""POST /generate: the native request of SGLang, which its bench tools speak."""

from __future__ import annotations

from typing import Any

import msgspec
from sanic import HTTPResponse, Sanic
from sanic.request import Request

from engine.errors import InvalidRequest
from engine.sampling.params import SamplingParams
from engine.server.answer import new_response_id
from engine.server.body import read_request, run_sized
from engine.server.context import ServerContext
from engine.server.generate_schema import (
    DEFAULT_MAX_NEW_TOKENS,
    NativeRequest,
    native_names,
    parse_generate,
)
from engine.server.model_files import ModelFiles
from engine.server.native_answer import NativeAnswer, NativeShape
from engine.server.openapi_requests import REQUESTS
from engine.server.routes.completions import check_num_scores, encode_prompts
from engine.server.schema import Defaults, check_token_ids


def add_routes(app: Sanic, context: ServerContext) -> None:
    @app.post("/generate", stream=True)
    async def generate(request: Request) -> HTTPResponse | None:
        model, ready = context.require_generation()
        asked = await read_request(request, lambda body: _parse(context, model, body))
        prompts = await run_sized(request, lambda: _encode(model, asked, ready.context_length))
        response_id = new_response_id("gen")
        names = asked.rids or _names(response_id, asked, len(prompts))
        shape = NativeShape(model.tokenizer, asked, prompts, names)
        answer = NativeAnswer(
            request=request,
            asked=asked.common,
            shape=shape,
            response_id=response_id,
            config=context.config,
        )
        with native_names("text"):
            prompt_names = [name for name in names if name != response_id]
            shape.generation = await answer.admit(
                context, model.tokenizer, prompts, prompt_names=prompt_names
            )
        return await answer.send(shape.generation)


def _parse(context: ServerContext, model: ModelFiles, body: dict[str, Any]) -> NativeRequest:
    if isinstance(name := body.get("model"), str):
        context.names.check(name)
    defaults = Defaults(max_tokens=DEFAULT_MAX_NEW_TOKENS, sampling=model.sampling_defaults)
    asked = parse_generate(body, defaults, model.vocab_size)
    with native_names("text"):
        for part in asked.parts:
            check_token_ids(part.params, model.vocab_size)
    context.ignored.check(asked.ignored, REQUESTS["GenerateRequest"]["properties"])
    return asked


def _encode(
    model: ModelFiles, asked: NativeRequest, context_length: int
) -> list[tuple[list[int], SamplingParams]]:
    """Token ids and parameters of each prompt."""
    with native_names("text"):
        prompts = [
            prompt for part in asked.parts for prompt in encode_prompts(model, part, context_length)[0]
        ]
        check_num_scores(prompts, asked.common.n)
    return [_scored_from(*prompt, start) for prompt, start in zip(prompts, asked.logprob_starts, strict=True)]


def _scored_from(
    ids: list[int], params: SamplingParams, start: int | None
) -> tuple[list[int], SamplingParams]:
    if not start:
        return ids, params
    if start > len(ids):
        raise InvalidRequest(
            f"logprob_start_len is {start}, more than the {len(ids)} tokens of its prompt",
            param="logprob_start_len",
        )
    return ids, msgspec.structs.replace(params, prompt_logprobs_start=start)


def _names(response_id: str, asked: NativeRequest, num_prompts: int) -> list[str]:
    if asked.is_single:
        return [response_id]
    return [f"{response_id}_{i}" for i in range(num_prompts)]
