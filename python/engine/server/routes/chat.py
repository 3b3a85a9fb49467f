"""POST /v1/chat/completions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import msgspec
from sanic import HTTPResponse, Sanic
from sanic.request import Request

from engine.core.output_processor import TextDelta
from engine.server.answer import Answer, joined, new_response_id, output_ids, scored_tokens
from engine.server.body import read_request, run_sized
from engine.server.context import ServerContext
from engine.server.generation import cut_left, encode, fit_context
from engine.server.logprobs import chat_logprobs
from engine.server.message import message_parts, whole_message
from engine.server.model_files import ModelFiles
from engine.server.openapi_requests import REQUESTS
from engine.server.output_format import choose_output_format, choose_thinking, with_whole_constraint
from engine.server.schema import ChatRequest, Defaults, check_token_ids, model_of, parse_chat
from engine.server.sse import Events
from engine.server.thoughts import effort_variables
from engine.text.formats.detect import NONE
from engine.text.formats.events import Content
from engine.text.tokenizer import Tokenizer


def add_routes(app: Sanic, context: ServerContext) -> None:
    # stream=True: the body is read by us, after the key is checked and within our own limits.
    @app.post("/v1/chat/completions", stream=True)
    async def chat_completions(request: Request) -> HTTPResponse | None:
        model, ready = context.require_generation()
        asked = await read_request(request, lambda body: parse(context, model, body))
        text = await run_sized(request, lambda: render_prompt(model, asked))
        whole_ids = await run_sized(request, lambda: encode_prompt(model, text, ready.context_length))
        prompt_ids = cut_left(whole_ids, asked, ready.context_length)
        params = fit_context(
            asked.params, len(prompt_ids), ready.context_length, is_default=asked.max_tokens_is_default
        )
        output_format = choose_output_format(model, asked, text)
        thinking = choose_thinking(model.tokenizer, output_format, asked)
        params = msgspec.structs.replace(params, thinking=thinking)
        # Rendered, a conversation is not needed again: it may be large, and answers take long.
        asked = dataclasses.replace(asked, messages=[], template_variables={})
        answer = Answer(
            request=request,
            asked=asked,
            shape=ChatShape(model.tokenizer, asked, prompt_ids),
            response_id=new_response_id("chatcmpl"),
            config=context.config,
            num_truncated=len(whole_ids) - len(prompt_ids),
        )
        prompts = [(prompt_ids, params)]
        return await answer.send(
            await answer.admit(context, model.tokenizer, prompts, output_format=output_format)
        )


def parse(context: ServerContext, model: ModelFiles, body: dict[str, Any]) -> ChatRequest:
    context.names.check(model_of(body))
    defaults = Defaults(
        max_tokens=context.config.default_max_tokens_chat,
        constraint_lifts_limit=True,
        sampling=model.sampling_defaults,
    )
    asked = parse_chat(body, defaults)
    check_token_ids(asked.params, model.vocab_size)
    context.ignored.check(asked.ignored, REQUESTS["ChatRequest"]["properties"])
    return with_whole_constraint(model, asked, is_parsing=context.config.tool_call_parser != NONE)


def render_prompt(model: ModelFiles, asked: ChatRequest) -> str:
    """The whole conversation as the model reads it."""
    template, variables = model.chat_template, asked.template_variables
    offered = None if asked.tools is None else asked.tools.offered
    return template.render(
        asked.messages,
        tools=offered and [tool.shown(needs_description=template.needs_descriptions) for tool in offered],
        add_generation_prompt=asked.add_generation_prompt,
        continue_final_message=asked.continue_final_message,
        **effort_variables(asked.thoughts.effort, template, variables),
        **variables,
    )


def encode_prompt(
    model: ModelFiles, text: str, context_length: int, *, add_special_tokens: bool = False
) -> list[int]:
    """Token ids of a rendered conversation; templates write special tokens themselves."""
    return encode(model.tokenizer, text, context_length, add_special_tokens=add_special_tokens)


class ChatShape:
    """Choices with a message each; in streams, role first, then content, then the reason of the end."""

    object_name = "chat.completion"
    stream_object_name = "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, asked: ChatRequest, prompt_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._num_choices = asked.n
        self._has_logprobs = asked.params.logprobs is not None
        self._returns_ids = asked.return_token_ids
        self._may_call = asked.tools is not None
        self.fields = {"prompt_token_ids": prompt_ids} if asked.return_token_ids else {}

    def opening(self, events: Events) -> Iterable[bytes]:
        # Content that was null once can stay so: what has a call often has nothing else.
        content = None if self._may_call else ""
        for index in range(self._num_choices):
            yield events.role(index, content, **({} if index else self.fields))

    def events(self, events: Events, index: int, delta: TextDelta, **extra: Any) -> Iterable[bytes]:
        ids = self._output_ids([delta]) if delta.token_ids else {}
        if delta.events is not None:
            yield from self._parts(events, index, delta, ids, extra.get("usage"))
        elif delta.text or delta.tokens or ids:
            yield events.delta(index, delta.text, self._logprobs(delta.tokens), extra.get("usage"), ids)
        if delta.finish_reason is not None:
            yield events.end(index, delta.finish_reason, delta.matched_stop, **extra)

    def _parts(
        self, events: Events, index: int, delta: TextDelta, ids: dict[str, Any], usage: dict[str, Any] | None
    ) -> Iterable[bytes]:
        """What belongs to the tokens of the delta goes with its first part, empty if need be."""
        parts = message_parts(delta.events or ())
        if not parts and (delta.tokens or ids):
            parts.append({})
        for i, part in enumerate(parts):
            logprobs = None if i else self._logprobs(delta.tokens)
            yield events.part(index, part, logprobs, usage, {} if i else ids)

    def choice(self, index: int, deltas: list[TextDelta]) -> dict[str, Any]:
        found = [event for delta in deltas for event in delta.events or ()]
        is_read = deltas[-1].events is not None
        return {
            "index": index,
            "message": whole_message(found if is_read else [Content(joined(deltas))]),
            "logprobs": self._logprobs(scored_tokens(deltas)),
            "finish_reason": deltas[-1].finish_reason,
            "matched_stop": deltas[-1].matched_stop,
            **self._output_ids(deltas),
        }

    def _logprobs(self, tokens: list[Any]) -> dict[str, Any] | None:
        return chat_logprobs(self._tokenizer, tokens) if self._has_logprobs else None

    def _output_ids(self, deltas: list[TextDelta]) -> dict[str, Any]:
        return output_ids(deltas) if self._returns_ids else {}
