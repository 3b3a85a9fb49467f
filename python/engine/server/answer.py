"""Sending the answer of a generation, as a stream or whole: what both kinds of completion share."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import msgspec
from sanic import HTTPResponse
from sanic.request import Request

from engine.config.server_config import ServerConfig
from engine.core.output_processor import TextDelta
from engine.sampling.params import SamplingParams
from engine.server.context import ServerContext
from engine.server.error_map import CLIENT_CLOSED, to_http
from engine.server.generation import Generation
from engine.server.ignored import ignored_header
from engine.server.request_id import request_id_of
from engine.server.request_log import endpoint_of, log_of
from engine.server.schema import GenerationRequest
from engine.server.sse import DONE, Events, EventStream, error_event
from engine.server.stream_interval import in_intervals
from engine.text.tokenizer import Tokenizer

_MAX_SEEDS_SHOWN = 64


class Shape(Protocol):
    """How one kind of completion writes its choices."""

    object_name: str
    stream_object_name: str
    fields: dict[str, Any]
    """What stands beside the choices of an answer that is not streamed."""

    def opening(self, events: Events) -> Iterable[bytes]:
        """Events that go out before any token."""
        ...

    def events(self, events: Events, index: int, delta: TextDelta, **extra: Any) -> Iterable[bytes]:
        """Events for a delta; `extra` goes beside `choices`."""
        ...

    def choice(self, index: int, deltas: list[TextDelta]) -> dict[str, Any]:
        """A whole choice from all its deltas."""
        ...


@dataclasses.dataclass(kw_only=True)
class Answer:
    """One answer on its way."""

    request: Request
    asked: GenerationRequest
    shape: Shape
    response_id: str
    config: ServerConfig
    num_truncated: int = 0
    """Tokens that were cut from the left of the prompts, as the request allows."""

    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    finish_reasons: dict[int, str] = dataclasses.field(default_factory=dict)

    async def admit(
        self,
        context: ServerContext,
        tokenizer: Tokenizer,
        prompts: Sequence[tuple[list[int], SamplingParams]],
        **options: Any,
    ) -> Generation:
        """`Generation.admit` for the prompts of this request, on behalf of who sent it."""
        return await Generation.admit(
            context,
            tokenizer,
            self.asked,
            prompts,
            self.response_id,
            client=self.request.ctx.client,
            trace_id=request_id_of(self.request),
            **options,
        )

    async def send(self, generation: Generation) -> HTTPResponse | None:
        """Run the generation to its end. Returns the answer, unless it was streamed.

        Effects: logs one line about the request; leaves nothing running in the engine.
        """
        log = log_of(self.request)
        log.is_later = self.asked.stream
        status, outcome = CLIENT_CLOSED, "cancelled"
        try:
            async with generation:
                if self.asked.stream:
                    response = None
                    outcome = await self._stream(generation)
                else:
                    response = await self._whole(generation)
                    outcome = self._outcome
            status = 200
        except Exception:
            status, outcome = 0, "error"
            raise
        finally:
            log.details = self._log_details(generation, outcome)
            if status == CLIENT_CLOSED or self.asked.stream:
                log.write(endpoint_of(self.request.route), status)
        return response

    async def _whole(self, generation: Generation) -> HTTPResponse:
        deltas: list[list[TextDelta]] = [[] for _ in range(generation.num_choices)]
        async with generation.in_time():
            async for index, delta in generation.deltas():
                deltas[index].append(delta)
                self._note_end(index, delta)
        choices = await self._choices(deltas)
        was_cut = "length" in self.finish_reasons.values()
        return HTTPResponse(
            msgspec.json.encode(self._content(generation, choices)),
            headers=self._headers(generation, was_cut),
            content_type="application/json",
        )

    def _content(self, generation: Generation, choices: list[dict[str, Any]]) -> Any:
        return {
            "id": self.response_id,
            "object": self.shape.object_name,
            "created": self.created,
            "model": self.asked.model,
            "choices": choices,
            "usage": self._usage(generation),
            **self.shape.fields,
            **self._details(generation),
        }

    async def _choices(self, deltas: list[list[TextDelta]]) -> list[dict[str, Any]]:
        def make() -> list[dict[str, Any]]:
            return [self.shape.choice(i, own) for i, own in enumerate(deltas)]

        # Scores of a long prompt take a while to write out: others go on meanwhile.
        return make() if self.asked.params.prompt_logprobs is None else await asyncio.to_thread(make)

    async def _stream(self, generation: Generation) -> str:
        """Returns how it went, for the log."""
        events = Events(
            object_name=self.shape.stream_object_name,
            response_id=self.response_id,
            created=self.created,
            model=self.asked.model,
            has_usage=self.asked.include_usage,
        )
        headers = self._headers(generation, may_be_cut=True)
        limits = self.request.app.ctx.server.limits
        generation.bound_unread(limits.unread_tokens)
        async with EventStream(
            self.request, headers, keep_alive_s=self.config.sse_keep_alive_s, send_s=limits.send_s
        ) as stream:
            try:
                async with generation.in_time():
                    await self._stream_choices(generation, events, stream)
                outcome = self._outcome
            except Exception as error:  # the status line is out: the error goes into the stream
                generation.give_up(error)
                http_error = to_http(error, request_id_of(self.request))
                stream.hold(error_event(http_error.body(self.config.error_format)))
                outcome = log_of(self.request).code = http_error.slug
            stream.hold(DONE)
        return outcome

    async def _stream_choices(self, generation: Generation, events: Events, stream: EventStream) -> None:
        """Send every event but those of the last delta, which go out with the end of the stream."""
        opening: Iterable[bytes] = self.shape.opening(events)
        if self.asked.await_first_token:
            await stream.send(b"")  # the headers do not wait
        elif generation.has_unread:  # the first token is there already, and all goes out together
            await stream.hold_all(opening)
            opening = ()
        else:
            await stream.send_all(opening)
            opening = ()
        deltas = generation.deltas()
        interval = self.asked.stream_interval or self.config.stream_interval
        if interval > 1:
            deltas = in_intervals(deltas, interval)
        async for index, delta in deltas:
            if opening:
                await stream.send_all(opening)
                opening = ()
            extra: dict[str, Any] = {"usage": self._usage(generation)} if self.asked.continuous_usage else {}
            is_last = False
            if delta.finish_reason is not None:
                self._note_end(index, delta)
                is_last = len(self.finish_reasons) == generation.num_choices
                if is_last and not self.asked.include_usage:
                    extra |= self._details(generation)
            made = self.shape.events(events, index, delta, **extra)
            if delta.prompt_logprobs is not None:
                made = await asyncio.to_thread(list, made)
            for event in made:
                stream.hold(event)
            # Choices that grew in the same step go out together.
            is_followed = is_last or (interval == 1 and generation.has_unread)
            if stream.is_full or not is_followed:
                await stream.flush()
        if self.asked.include_usage:
            stream.hold(events.usage(self._usage(generation), **self._details(generation)))

    def _note_end(self, index: int, delta: TextDelta) -> None:
        if delta.finish_reason is not None:
            self.finish_reasons[index] = delta.finish_reason

    def _usage(self, generation: Generation) -> dict[str, Any]:
        details = None
        if self.config.enable_cache_report or self.asked.return_cached_details:
            details = {"cached_tokens": generation.cached_tokens}
        return {**generation.usage, "prompt_tokens_details": details}

    def _details(self, generation: Generation) -> dict[str, Any]:
        """What the request asked to be told about itself; goes beside the choices of the last event."""
        details: dict[str, Any] = {}
        if self.asked.return_cached_details:
            details["sglext"] = {"cached_tokens_details": {"device": generation.cached_tokens, "host": 0}}
        if self.asked.truncate_prompt_tokens is not None:
            details["truncated_prompt_tokens"] = self.num_truncated
        if self.asked.return_timings:
            details["timings"] = generation.timings
        return details

    def _headers(self, generation: Generation, may_be_cut: bool) -> dict[str, str]:
        headers = ignored_header(self.asked.ignored)
        if self.asked.params.seed is None:
            headers["x-seed"] = ",".join(map(str, generation.seeds[:_MAX_SEEDS_SHOWN]))
        if may_be_cut and self.asked.max_tokens_is_default and self.asked.params.max_tokens is not None:
            headers["x-default-max-tokens"] = str(self.asked.params.max_tokens)
        if self.num_truncated:
            headers["x-truncated-prompt-tokens"] = str(self.num_truncated)
        if self.asked.return_timings:
            known = ("queue",) if self.asked.stream else ("queue", "prefill", "decode")
            timings = generation.timings
            headers["server-timing"] = ", ".join(f"{name};dur={timings[name + '_ms']}" for name in known)
        return headers

    @property
    def _outcome(self) -> str:
        return ",".join(dict.fromkeys(self.finish_reasons.values()))

    def _log_details(self, generation: Generation, outcome: str) -> dict[str, Any]:
        return {
            "id": self.response_id,
            "stream": self.asked.stream,
            "choices": generation.num_choices,
            "prompt_tokens": generation.prompt_tokens,
            "cached_tokens": generation.cached_tokens,
            "completion_tokens": generation.completion_tokens,
            "end": outcome,
            "user": self.asked.user,
            **generation.timings,
        }


def new_response_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(16)}"


def joined(deltas: list[TextDelta]) -> str:
    return "".join([delta.text for delta in deltas])


def scored_tokens(deltas: list[TextDelta]) -> list[Any]:
    return [token for delta in deltas for token in delta.tokens]


def output_ids(deltas: list[TextDelta]) -> dict[str, list[int]]:
    """The field with the generated tokens of some deltas."""
    return {"token_ids": [token_id for delta in deltas for token_id in delta.token_ids]}
