"""One HTTP request in the engine: admission, the merged deltas of its prompts, and its totals."""

from __future__ import annotations

import asyncio
import functools
import secrets
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any

import msgspec
import numpy as np

from engine.core.client import EngineClient, RequestStream
from engine.core.messages import EngineReady, GenerateRequest, TokenChunk
from engine.core.output_processor import OutputProcessor, TextDelta
from engine.errors import EngineError, InvalidRequest
from engine.sampling.params import SamplingParams
from engine.server.adapter_hold import AdapterHold, aborted_error
from engine.server.auth import Client
from engine.server.choice_reader import ChoiceReader
from engine.server.context import ServerContext
from engine.server.deadline import Deadline, Deadlines
from engine.server.metrics import RequestTimer
from engine.server.output_format import shown_ids
from engine.server.prompt_scores import after_scores
from engine.server.schema import GenerationRequest
from engine.text.formats.output import OutputFormat
from engine.text.stop_strings import StopStrings
from engine.text.tokenizer import Tokenizer

_MOST_PUMPED = 64
_MOST_CHARS_A_TOKEN = 512  # vocabularies have runs of 128 spaces, hardly more


def encode(tokenizer: Tokenizer, text: str, context_length: int, *, add_special_tokens: bool) -> list[int]:
    """Token ids of a prompt.

    Raises `InvalidRequest` for a text that cannot fit the context, before time is spent on it.
    """
    if len(text) > context_length * _MOST_CHARS_A_TOKEN:
        raise InvalidRequest(
            f"The input ({len(text)} characters) is longer than the model's context length "
            f"({context_length} tokens).",
            slug="context_length_exceeded",
        )
    return tokenizer.encode(text, add_special_tokens)


def cut_left(ids: list[int], request: GenerationRequest, context_length: int) -> list[int]:
    """The end of a prompt, as much as `truncate_prompt_tokens` keeps; all of it unless that is given."""
    most = request.truncate_prompt_tokens
    if most is None:
        return ids
    if most == -1:
        max_tokens = request.params.max_tokens
        most = max(1, context_length - (1 if max_tokens is None else max_tokens))
    return ids[-most:]


def fit_context(
    params: SamplingParams, prompt_len: int, context_length: int, *, is_default: bool
) -> SamplingParams:
    """`params` for a prompt of this length: a limit that nobody asked for is cut to what is left.

    Raises `InvalidRequest` if the prompt, or the prompt and the answer asked for, do not fit.
    """
    if prompt_len > context_length - (params.max_tokens != 0):
        raise InvalidRequest(
            f"The input ({prompt_len} tokens) is longer than the model's context length "
            f"({context_length} tokens).",
            slug="context_length_exceeded",
        )
    total = prompt_len + (params.max_tokens or 0)
    if total <= context_length:
        return params
    if is_default:
        return msgspec.structs.replace(params, max_tokens=context_length - prompt_len)
    raise InvalidRequest(
        f"Requested token count exceeds the model's maximum context length of {context_length} tokens. "
        f"You requested a total of {total} tokens: {prompt_len} of prompt, {params.max_tokens} to generate.",
        slug="context_length_exceeded",
        param="max_tokens",
    )


class Generation:
    """An admitted request. Choice `index` is prompt times n plus sample.

    Use as an asynchronous context manager: leaving it frees in the engine whatever still runs.
    """

    def __init__(
        self,
        context: ServerContext,
        request: GenerationRequest,
        requests: list[GenerateRequest],
        client: Client,
    ) -> None:
        self.num_choices = request.n * len(requests)
        self.prompt_tokens = sum(len(r.prompt) // 4 for r in requests)
        self.completion_tokens = 0
        self.cached_tokens_of = [0] * len(requests)
        """By prompt."""

        self._client: EngineClient = context.client
        self._deadlines = Deadlines(context.config, context.client)
        self._limits = client.limits
        self._num_reserved = 0
        self._is_admitted = False
        self._live = context.live
        self._names: tuple[str, ...] = ()
        self._is_aborted = False
        self._cause: str | None = None
        """Why it ended before its end: client, abort, or the code of an error."""
        self._num_ended = 0
        self._timer = RequestTimer(context.metrics)
        self._requests = requests
        self._unfinished = {r.request_id for r in requests}
        self._adapter = AdapterHold(context.adapters)
        self._streams: list[RequestStream] = []
        self._pumped: asyncio.Queue[tuple[int, TextDelta] | Exception] | None = None
        """The deltas of several prompts, in the order of their arrival."""
        if len(requests) > 1:
            self._pumped = asyncio.Queue(_MOST_PUMPED)
        self._processors: list[OutputProcessor] = []
        self._readers: list[ChoiceReader] = []
        self.reasoning_tokens: int | None = None
        """Tokens of thoughts, where the outputs are searched for them."""

    @classmethod
    async def admit(
        cls,
        context: ServerContext,
        tokenizer: Tokenizer,
        request: GenerationRequest,
        prompts: Sequence[tuple[list[int], SamplingParams]],
        response_id: str,
        prompt_names: Sequence[str] = (),
        *,
        client: Client,
        trace_id: str,
        output_format: OutputFormat | None = None,
    ) -> Generation:
        """Wait until every prompt has a running slot. Raises the refusal of the first that is refused,
        and what the client's own limits refuse.

        With an `output_format` deltas tell what their text means.

        Effects: until it is closed, it can be aborted by `rid` and by `response_id`, and each prompt
        by its own name if there are `prompt_names`.
        """
        _check_places(request.n * len(prompts), context.client.info)
        requests = [
            GenerateRequest(
                request_id=f"{response_id}-{i}",
                prompt=np.asarray(ids, dtype="<i4").tobytes(),
                params=params,
                n=request.n,
                namespace=request.cache_salt,
                priority=request.priority,
                client=client.name,
                weight=client.weight,
                trace_id=trace_id,
            )
            for i, (ids, params) in enumerate(prompts)
        ]
        if len(requests) > 1 and request.params.seed is None:
            requests = _with_seeds(requests)
        self = cls(context, request, requests, client)
        aborts = dict.fromkeys(filter(None, (response_id, request.rid)), self.abort)
        aborts |= {name: functools.partial(self.abort_prompt, i) for i, name in enumerate(prompt_names)}
        stops = StopStrings(request.params.stop, request.params.include_stop)
        tags = None if output_format is None else output_format.tags
        if output_format is not None:
            self.reasoning_tokens = None if output_format.thoughts is None else 0
            self._readers = [ChoiceReader(output_format, tokenizer) for _ in range(self.num_choices)]
        try:
            self._names = context.live.add(aborts, self.abort)
            self._processors = [
                OutputProcessor(
                    tokenizer,
                    params,
                    ids,
                    request.n,
                    stops if _has_stops(params, request) else None,
                    shown_ids(tokenizer, request.params, output_format),
                    frozenset() if tags is None else frozenset((tags.start, tags.end)),
                )
                for ids, params in prompts
            ]
            self._reserve_tokens(context.client.info)
            async with self.in_time(), self._deadlines.until_run():
                adapter = await self._adapter.find(request.model, request.lora_path)
                if adapter is not None:
                    self._requests = [msgspec.structs.replace(r, adapter=adapter) for r in requests]
                self._streams = await _submit_all(context.client, self._requests)
            if self._is_aborted:  # before all of them were submitted: those that were not ran on
                raise aborted_error()
        except BaseException as error:
            self.close()
            if self._is_aborted or isinstance(error, asyncio.CancelledError):
                context.metrics.count_cancellation("abort" if self._is_aborted else "client")
            if self._is_aborted and isinstance(error, InvalidRequest):
                raise aborted_error() from None
            raise
        self._is_admitted = True
        self._timer.admitted(self.prompt_tokens)
        if request.params.constraint is not None:
            context.metrics.structured.inc()
        return self

    def _reserve_tokens(self, ready: EngineReady | None) -> None:
        if self._limits is None or ready is None:
            return
        num_tokens = self.prompt_tokens
        for request in self._requests:
            most = request.params.max_tokens
            rest = ready.context_length - len(request.prompt) // 4
            num_tokens += request.n * (rest if most is None else most)
        self._limits.take_tokens(num_tokens)
        self._num_reserved = num_tokens

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.give_up(error)
        is_complete = self._cause is None and self._num_ended == self.num_choices
        self._timer.ended(
            self.cached_tokens, self.completion_tokens, is_complete=is_complete, cause=self._cause
        )

    def give_up(self, error: BaseException) -> None:
        """End what runs because of `error`: the client is gone, time is up, or the engine failed."""
        if self._cause is None:
            gone = isinstance(error, asyncio.CancelledError)
            self._cause = "client" if gone else error.slug if isinstance(error, EngineError) else "error"
        self.close()

    def in_time(self) -> Deadline:
        """What does not end within --request-timeout raises `Overloaded`."""
        return self._deadlines.until_done()

    def bound_unread(self, num_tokens: int) -> None:
        """Give the request up when its reader is that many tokens behind in a choice."""
        for stream, request in zip(self._streams, self._requests, strict=True):
            stream.max_unread = num_tokens * request.n

    def close(self) -> None:
        """Cancel what has not come to its end."""
        for request_id in self._unfinished:
            self._client.cancel(request_id)
        self._unfinished.clear()
        self._live.remove(self._names)
        self._adapter.release()
        if self._limits is not None and self._num_reserved:
            num_used = self.prompt_tokens + self.completion_tokens if self._is_admitted else 0
            self._limits.give_back(self._num_reserved - num_used)
            self._num_reserved = 0

    def abort(self) -> None:
        """End it from outside: choices that are not complete get the finish reason "abort"."""
        self._is_aborted, self._cause = True, "abort"
        self._adapter.abort()
        for request_id in self._unfinished:
            self._client.cancel(request_id)

    def abort_prompt(self, prompt: int) -> None:
        """Like `abort`, for the choices of one prompt; before it runs, for all of them."""
        self._is_aborted = True
        self._adapter.abort()
        self._client.cancel(self._requests[prompt].request_id)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens taken from the prefix cache, as far as that is known."""
        return sum(self.cached_tokens_of)

    @property
    def seeds(self) -> list[int]:
        """The seed in force of each prompt, drawn by the engine unless the client gave one."""
        return [stream.admitted.seed for stream in self._streams]

    @property
    def timings(self) -> dict[str, float]:
        """How long its parts took so far, in milliseconds."""
        return self._timer.timings

    @property
    def usage(self) -> dict[str, Any]:
        """Totals so far; the prompt counts once however many choices it has."""
        usage: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }
        if self.reasoning_tokens is not None:
            usage["completion_tokens_details"] = {"reasoning_tokens": self.reasoning_tokens}
        return usage

    @property
    def has_unread(self) -> bool:
        """Whether `deltas` will give another one at once."""
        return self._streams[0].has_unread if self._pumped is None else not self._pumped.empty()

    def deltas(self) -> AsyncIterator[tuple[int, TextDelta]]:
        """(index, delta) until every choice has ended. Raises `EngineError` when a prompt dies."""
        return self._deltas_of(0) if self._pumped is None else self._merged_deltas(self._pumped)

    async def _merged_deltas(
        self, pumped: asyncio.Queue[tuple[int, TextDelta] | Exception]
    ) -> AsyncIterator[tuple[int, TextDelta]]:
        tasks = [asyncio.create_task(self._pump(i, pumped)) for i in range(len(self._streams))]
        try:
            num_open = self.num_choices
            while num_open:
                item = await pumped.get()
                if isinstance(item, BaseException):
                    raise item
                num_open -= item[1].finish_reason is not None
                yield item
        finally:
            for task in tasks:
                task.cancel()

    async def _pump(self, prompt: int, pumped: asyncio.Queue[tuple[int, TextDelta] | Exception]) -> None:
        try:
            async for item in self._deltas_of(prompt):
                await pumped.put(item)
        except Exception as error:  # handed to the reader, who raises it
            await pumped.put(error)

    def _deltas_of(self, prompt: int) -> AsyncIterator[tuple[int, TextDelta]]:
        deltas = self._running_deltas_of(prompt)
        request = self._requests[prompt]
        if request.params.prompt_logprobs is None:
            return deltas
        return after_scores(deltas, request.params.num_prompt_scores(len(request.prompt_ids)))

    async def _running_deltas_of(self, prompt: int) -> AsyncIterator[tuple[int, TextDelta]]:
        request, processor = self._requests[prompt], self._processors[prompt]
        num_running = request.n
        still_open = set(range(request.n))
        counted_cache = False
        counts_by_text = self._readers and self._readers[prompt * request.n].counts_by_text
        chunks = self._streams[prompt]
        async for chunk in _single_tokens(chunks) if counts_by_text else chunks:
            index = prompt * request.n + chunk.choice
            self._timer.tokens(index, len(chunk.token_ids))
            if chunk.choice == 0 and not counted_cache:
                counted_cache = True
                self.cached_tokens_of[prompt] = chunk.cached_tokens
            if chunk.finish_reason is not None:
                num_running -= 1
                if not num_running:
                    self._unfinished.discard(request.request_id)
            delta = processor.process(chunk)
            if delta is None:
                continue
            self.completion_tokens += delta.num_tokens
            if self._readers:
                self._read(index, delta)
            if delta.finish_reason is not None:
                still_open.discard(chunk.choice)
                self._num_ended += 1
                if chunk.finish_reason is None:
                    self._client.cancel_choice(request.request_id, chunk.choice)
            yield index, delta
            if not still_open:
                return
        for choice in sorted(still_open):
            last = TextDelta("", [], 0, "abort")
            if self._readers:
                self._read(prompt * request.n + choice, last)
            yield prompt * request.n + choice, last

    def _read(self, index: int, delta: TextDelta) -> None:
        num_thoughts = self._readers[index].read(delta)
        if self.reasoning_tokens is not None:
            self.reasoning_tokens += num_thoughts


async def _single_tokens(chunks: AsyncIterator[TokenChunk]) -> AsyncIterator[TokenChunk]:
    """A chunk for each token: where thoughts are told by the text alone, each token is one of them or not."""
    async for chunk in chunks:
        last = len(chunk.token_ids) - 1
        for i in range(last):
            logprobs = chunk.logprobs and chunk.logprobs[i : i + 1]
            yield TokenChunk(
                chunk.request_id, chunk.choice, chunk.token_ids[i : i + 1], logprobs, chunk.cached_tokens
            )
        if last > 0:
            logprobs = chunk.logprobs and chunk.logprobs[last:]
            chunk = msgspec.structs.replace(chunk, token_ids=chunk.token_ids[last:], logprobs=logprobs)
        yield chunk


def _with_seeds(requests: list[GenerateRequest]) -> list[GenerateRequest]:
    """Seeds that follow each other: who is told the first ones knows them all."""
    first = secrets.randbits(52)  # the last one is exact in every JSON reader, too
    return [
        msgspec.structs.replace(r, params=msgspec.structs.replace(r.params, seed=first + i))
        for i, r in enumerate(requests)
    ]


def _check_places(num_choices: int, ready: EngineReady | None) -> None:
    """Raises `InvalidRequest` for more choices than an idle engine takes: to try again would be in vain."""
    if ready is None or ready.max_queued_requests is None:
        return
    places = ready.max_running_requests + ready.max_queued_requests
    if num_choices > places:
        raise InvalidRequest(
            f"n for each prompt makes {num_choices} choices, but at most {places} can be served at once",
            param="n",
        )


def _has_stops(params: SamplingParams, request: GenerationRequest) -> bool:
    """Whether the stop strings of a prompt are those of the request, compiled once for all."""
    shared = request.params
    return params.stop is shared.stop and params.include_stop == shared.include_stop


async def _submit_all(client: EngineClient, requests: list[GenerateRequest]) -> list[RequestStream]:
    if len(requests) == 1:
        return [await client.submit(requests[0])]
    tasks = [asyncio.create_task(client.submit(request)) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        # Wait for all of them, so that a submission that was just accepted is known and cancelled.
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
