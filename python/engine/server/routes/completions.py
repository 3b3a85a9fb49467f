"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sanic import HTTPResponse, Sanic
from sanic.request import Request

from engine.core.output_processor import TextDelta
from engine.sampling.params import SamplingParams
from engine.server.answer import Answer, joined, new_response_id, scored_tokens
from engine.server.body import read_request, run_sized
from engine.server.context import ServerContext
from engine.server.generation import Generation, encode, fit_context
from engine.server.logprobs import CompletionLogprobs
from engine.server.model_files import ModelFiles
from engine.server.schema import (
    DEFAULT_MAX_TOKENS,
    CompletionRequest,
    Defaults,
    check_token_ids,
    model_of,
    parse_completion,
)
from engine.server.sse import Events
from engine.text.tokenizer import Tokenizer


def add_routes(app: Sanic, context: ServerContext) -> None:
    @app.post("/v1/completions", stream=True)
    async def completions(request: Request) -> HTTPResponse | None:
        model, ready = context.require_ready()
        asked = await read_request(request, lambda body: _parse(context, model, body))
        prompts = await run_sized(request, lambda: _encode_prompts(model, asked, ready.context_length))
        answer = Answer(
            request=request,
            asked=asked,
            shape=CompletionShape(model.tokenizer, _echoes(model, asked), asked),
            response_id=new_response_id("cmpl"),
            reports_cache=context.config.enable_cache_report,
        )
        generation = await Generation.admit(context, model.tokenizer, asked, prompts, answer.response_id)
        return await answer.send(generation)


def _parse(context: ServerContext, model: ModelFiles, body: dict[str, Any]) -> CompletionRequest:
    context.names.check(model_of(body))
    defaults = Defaults(max_tokens=DEFAULT_MAX_TOKENS, sampling=model.sampling_defaults)
    asked = parse_completion(body, defaults, model.vocab_size)
    check_token_ids(asked.params, model.vocab_size)
    return asked


def _encode_prompts(
    model: ModelFiles, asked: CompletionRequest, context_length: int
) -> list[tuple[list[int], SamplingParams]]:
    prompts = []
    for prompt in asked.prompts:
        if isinstance(prompt, str):
            ids = encode(model.tokenizer, prompt, context_length, add_special_tokens=True)
        else:
            ids = prompt
        params = fit_context(asked.params, len(ids), context_length, is_default=asked.max_tokens_is_default)
        prompts.append((ids, params))
    return prompts


def _echoes(model: ModelFiles, asked: CompletionRequest) -> list[str]:
    """The text that goes in front of each choice, by prompt."""
    if not asked.echo:
        return [""] * len(asked.prompts)
    return [p if isinstance(p, str) else model.tokenizer.decode(p) for p in asked.prompts]


class CompletionShape:
    """Choices with a text each, after the prompt's own text if that is echoed."""

    object_name = stream_object_name = "text_completion"

    def __init__(self, tokenizer: Tokenizer, echoes: list[str], asked: CompletionRequest) -> None:
        self._echoes = [echo for echo in echoes for _ in range(asked.n)]
        self._logprobs = None
        if asked.params.logprobs is not None:
            self._logprobs = [CompletionLogprobs(tokenizer, len(echo)) for echo in self._echoes]

    def opening(self, events: Events) -> Iterable[bytes]:
        return [events.text(index, echo) for index, echo in enumerate(self._echoes) if echo]

    def events(self, events: Events, index: int, delta: TextDelta, **extra: Any) -> Iterable[bytes]:
        if delta.text or delta.tokens or delta.finish_reason is not None:
            yield events.text(
                index,
                delta.text,
                self._take_logprobs(index, delta.tokens),
                delta.finish_reason,
                delta.matched_stop,
                **extra,
            )

    def choice(self, index: int, deltas: list[TextDelta]) -> dict[str, Any]:
        return {
            "index": index,
            "text": self._echoes[index] + joined(deltas),
            "logprobs": self._take_logprobs(index, scored_tokens(deltas)),
            "finish_reason": deltas[-1].finish_reason,
            "matched_stop": deltas[-1].matched_stop,
        }

    def _take_logprobs(self, index: int, tokens: list[Any]) -> dict[str, Any] | None:
        return None if self._logprobs is None else self._logprobs[index].take(tokens)
