"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sanic import HTTPResponse, Sanic
from sanic.request import Request

from engine.core.output_processor import TextDelta
from engine.errors import InvalidRequest
from engine.sampling.params import SamplingParams
from engine.server.answer import Answer, joined, new_response_id, output_ids, scored_tokens
from engine.server.body import read_request, run_sized
from engine.server.context import ServerContext
from engine.server.generation import cut_left, encode, fit_context
from engine.server.logprobs import CompletionLogprobs
from engine.server.model_files import ModelFiles
from engine.server.openapi_requests import REQUESTS
from engine.server.prompt_scores import token_offsets
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

MAX_ECHOED_SCORES = 2**19


def add_routes(app: Sanic, context: ServerContext) -> None:
    @app.post("/v1/completions", stream=True)
    async def completions(request: Request) -> HTTPResponse | None:
        model, ready = context.require_generation()
        asked = await read_request(request, lambda body: _parse(context, model, body))
        prompts, num_truncated = await run_sized(
            request, lambda: encode_prompts(model, asked, ready.context_length)
        )
        answer = Answer(
            request=request,
            asked=asked,
            shape=CompletionShape(
                model.tokenizer, _echoes(model, asked, prompts), asked, [ids for ids, _ in prompts]
            ),
            response_id=new_response_id("cmpl"),
            config=context.config,
            num_truncated=num_truncated,
        )
        return await answer.send(await answer.admit(context, model.tokenizer, prompts))


def _parse(context: ServerContext, model: ModelFiles, body: dict[str, Any]) -> CompletionRequest:
    context.names.check(model_of(body))
    defaults = Defaults(max_tokens=DEFAULT_MAX_TOKENS, sampling=model.sampling_defaults)
    asked = parse_completion(body, defaults, model.vocab_size)
    check_token_ids(asked.params, model.vocab_size)
    context.ignored.check(asked.ignored, REQUESTS["CompletionRequest"]["properties"])
    return asked


def encode_prompts(
    model: ModelFiles, asked: CompletionRequest, context_length: int
) -> tuple[list[tuple[list[int], SamplingParams]], int]:
    """Token ids and parameters of each prompt, and how many tokens were cut from them in all."""
    prompts, num_truncated = [], 0
    for prompt in asked.prompts:
        if isinstance(prompt, str):
            ids = encode(model.tokenizer, prompt, context_length, add_special_tokens=True)
        else:
            ids = prompt
        num_whole = len(ids)
        ids = cut_left(ids, asked, context_length)
        num_truncated += num_whole - len(ids)
        params = fit_context(asked.params, len(ids), context_length, is_default=asked.max_tokens_is_default)
        prompts.append((ids, params))
    check_num_scores(prompts, asked.n)
    return prompts, num_truncated


def check_num_scores(prompts: list[tuple[list[int], SamplingParams]], n: int) -> None:
    """Refuse an echo of scores that would take the server's memory and time from everybody else."""
    num_scores = n * sum(
        len(ids) * (params.prompt_logprobs + 1)
        for ids, params in prompts
        if params.prompt_logprobs is not None
    )
    if num_scores > MAX_ECHOED_SCORES:
        raise InvalidRequest(
            f"logprobs of the echoed prompts would be {num_scores} numbers, more than {MAX_ECHOED_SCORES}",
            param="logprobs",
        )


def _echoes(
    model: ModelFiles, asked: CompletionRequest, prompts: list[tuple[list[int], SamplingParams]]
) -> list[str]:
    """The text that goes in front of each choice, by prompt."""
    if not asked.echo:
        return [""] * len(asked.prompts)
    if asked.truncate_prompt_tokens is not None:  # what was cut is not echoed
        return [model.tokenizer.decode(ids) for ids, _ in prompts]
    return [p if isinstance(p, str) else model.tokenizer.decode(p) for p in asked.prompts]


class CompletionShape:
    """Choices with a text each, after the prompt's own text if that is echoed."""

    object_name = stream_object_name = "text_completion"

    def __init__(
        self, tokenizer: Tokenizer, echoes: list[str], asked: CompletionRequest, prompts: list[list[int]]
    ) -> None:
        self._tokenizer = tokenizer
        self._echoes, self._prompts, self._n = echoes, prompts, asked.n
        self._prompt_logprobs: dict[int, dict[str, Any]] = {}
        has_scores = asked.params.prompt_logprobs is not None
        self._awaiting_echo = set(range(len(echoes) * asked.n)) if has_scores else set()
        self._returns_ids = asked.return_token_ids
        self.fields: dict[str, Any] = {}
        self._logprobs = None
        if asked.params.logprobs is not None:
            self._logprobs = [CompletionLogprobs(tokenizer, len(echo)) for echo in echoes]
        self._is_plain = self._logprobs is None and not self._returns_ids and not has_scores
        """Whether events carry nothing but text."""

    def opening(self, events: Events) -> Iterable[bytes]:
        """The echo, unless scores belong to it, which are not there yet."""
        if self._awaiting_echo:
            return
        for index in range(len(self._echoes) * self._n):
            echo = self._echoes[index // self._n]
            prompt_ids = self._prompt_ids(index)
            if echo or prompt_ids:
                yield events.text(index, echo, fields=prompt_ids)

    def events(self, events: Events, index: int, delta: TextDelta, **extra: Any) -> Iterable[bytes]:
        if self._is_plain and delta.finish_reason is None and not extra:  # nearly always
            return (events.more_text(index, delta.text),) if delta.text else ()
        return self._events(events, index, delta, **extra)

    def _events(self, events: Events, index: int, delta: TextDelta, **extra: Any) -> Iterable[bytes]:
        if index in self._awaiting_echo:
            self._awaiting_echo.discard(index)
            echo, logprobs = self._echoes[index // self._n], self._echoed_logprobs(index, delta)
            yield events.text(index, echo, logprobs, fields=self._prompt_ids(index))
        ids = self._output_ids([delta]) if delta.token_ids else {}
        if delta.text or delta.tokens or delta.finish_reason is not None or ids:
            yield events.text(
                index,
                delta.text,
                self._output_logprobs(index, [delta]),
                delta.finish_reason,
                delta.matched_stop,
                ids,
                **extra,
            )

    def choice(self, index: int, deltas: list[TextDelta]) -> dict[str, Any]:
        logprobs = self._output_logprobs(index, deltas)
        echoed = self._echoed_logprobs(index, deltas[0])
        if logprobs is not None and echoed is not None:
            logprobs = {name: echoed[name] + values for name, values in logprobs.items()}
        return {
            "index": index,
            "text": self._echoes[index // self._n] + joined(deltas),
            "logprobs": logprobs,
            "finish_reason": deltas[-1].finish_reason,
            "matched_stop": deltas[-1].matched_stop,
            **self._prompt_ids(index),
            **self._output_ids(deltas),
        }

    def _output_logprobs(self, index: int, deltas: list[TextDelta]) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        starts = [start for delta in deltas for start in delta.token_starts]
        return self._logprobs[index // self._n].output(scored_tokens(deltas), starts)

    def _echoed_logprobs(self, index: int, delta: TextDelta) -> dict[str, Any] | None:
        """Those of the prompt, made once for all its choices; None if the delta does not bring them."""
        if self._logprobs is None or delta.prompt_logprobs is None:
            return None
        prompt = index // self._n
        if prompt not in self._prompt_logprobs:
            ids = self._prompts[prompt]
            offsets = token_offsets(self._tokenizer, ids, self._echoes[prompt])
            made = self._logprobs[prompt].prompt(ids, offsets, delta.prompt_logprobs)
            self._prompt_logprobs[prompt] = made
        return self._prompt_logprobs[prompt]

    def _prompt_ids(self, index: int) -> dict[str, Any]:
        """Once, with the first choice of the prompt."""
        is_told = self._returns_ids and index % self._n == 0
        return {"prompt_token_ids": self._prompts[index // self._n]} if is_told else {}

    def _output_ids(self, deltas: list[TextDelta]) -> dict[str, Any]:
        return output_ids(deltas) if self._returns_ids else {}
