"""The engine without its process: messages in, one step, messages out."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable

from engine.core.messages import (
    Admitted,
    CacheFlushed,
    CancelChoice,
    CancelRequest,
    EngineStats,
    Failed,
    FlushCache,
    GenerateRequest,
    StatsRequest,
    ToEngine,
    TokenChunk,
    TokenLogprobs,
    ToServer,
)
from engine.errors import EngineError, InternalError, InvalidRequest
from engine.scheduling.request import Request
from engine.scheduling.scheduler import NewToken, PrefixCache, Scheduler
from engine.scheduling.settings import SchedulerSettings
from engine.scheduling.step_plan import Runner, StepResult, StepRow, TokenScores

logger = logging.getLogger(__name__)


class EngineCore:
    """Scheduler and runner in one thread. `handle` takes messages between steps; `step` answers.

    Every accepted request ends in exactly one result for each choice, or in one `Failed`; a
    request that is cancelled ends in silence. A step whose runner raises fails the requests of that
    step, and the engine goes on with the others.
    """

    def __init__(
        self,
        settings: SchedulerSettings,
        runner: Runner,
        cache: PrefixCache,
        *,
        clock: Callable[[], float] = time.monotonic,
        draw_seed: Callable[[], int] = lambda: secrets.randbits(53),  # exact in every JSON reader
    ) -> None:
        self._scheduler = Scheduler(settings, cache, clock=clock)
        self._runner = runner
        self._cache = cache
        self._clock = clock
        self._draw_seed = draw_seed
        self._outbox: list[ToServer] = []
        self._model_s = 0.0

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to compute or to say."""
        return self._scheduler.has_work or bool(self._outbox)

    def handle(self, message: ToEngine) -> None:
        """Take one message; answers come with the next step. `Shutdown` is the caller's business."""
        match message:
            case GenerateRequest():
                self.submit(message)
            case CancelRequest():
                self._scheduler.cancel(message.request_id)
            case CancelChoice():
                self._scheduler.cancel_choice(message.request_id, message.choice)
            case StatsRequest():
                self._outbox.append(self.stats())
            case FlushCache():
                self._outbox.append(CacheFlushed(self.flush()))

    def submit(self, request: GenerateRequest) -> None:
        """Queue a request. A refusal is answered with `Failed`; nothing is raised."""
        seed = request.params.seed
        if seed is None:
            seed = self._draw_seed()
        try:
            if len(request.prompt) % 4:
                raise InvalidRequest("Invalid request: the prompt is not an array of int32", param="prompt")
            choices = self._scheduler.submit(
                request.request_id,
                request.prompt_ids,
                request.params,
                seed=seed,
                n=request.n,
                namespace=request.namespace,
                priority=request.priority,
                runs_alone=request.runs_alone,
            )
        except EngineError as error:
            self._outbox.append(Failed.from_error(request.request_id, error))
            return
        for choice in choices:
            if choice.has_nothing_to_do:  # max_tokens 0: finished before it began
                self._outbox.append(_admitted(choice))
                self._outbox.append(TokenChunk(choice.request_id, choice.choice, [], finish_reason="length"))

    def step(self, announce: Callable[[list[ToServer]], None] | None = None) -> list[ToServer]:
        """Compute one step, if there is anything to compute; everything to say since the last one.

        `announce` takes what can be said before the computing: refusals, and who is admitted, so that
        a client hears of it at once and not after a chunk of prefill.
        """
        plan = self._scheduler.schedule()
        self._outbox.extend(map(_admitted, self._scheduler.take_admitted()))
        if announce is not None and plan is not None and self._outbox:
            announce(self._take_outbox())
        if plan is not None:
            began_s = self._clock()
            try:
                result = self._runner.execute(plan)
            except Exception:
                logger.exception("a step of %d tokens failed; its requests are ended", plan.num_tokens)
                error = InternalError("The engine failed while it computed this request.")
                for request_id in self._scheduler.abandon(plan):
                    self._outbox.append(Failed.from_error(request_id, error))
            else:
                self._model_s += self._clock() - began_s
                for row, scores in zip(plan.scored_rows, result.prompt_scores, strict=True):
                    self._outbox.append(_prompt_chunk(row, scores))
                for i, new in enumerate(self._scheduler.update(plan, result)):
                    is_broken = new.finish_reason == "error"
                    self._outbox.append(self._fail(new) if is_broken else _chunk(new, result, i))
        return self._take_outbox()

    def _fail(self, new: NewToken) -> Failed:
        request_id = new.request.request_id
        logger.error("no token can be drawn for %s: the model computes nothing but NaN", request_id)
        self._scheduler.cancel(request_id)
        return Failed.from_error(request_id, InternalError("The model computed no usable numbers."))

    def flush(self) -> bool:
        """Empty the prefix cache, unless requests run or wait; whether it was done."""
        if self._scheduler.has_work:
            return False
        self._scheduler.flush_cache()
        return True

    def _take_outbox(self) -> list[ToServer]:
        messages, self._outbox = self._outbox, []
        return messages

    def stats(self) -> EngineStats:
        """Where things stand between two steps."""
        scheduler, cache, counters = self._scheduler, self._cache, self._scheduler.counters
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_blocks_total=cache.num_blocks,
            num_blocks_free=cache.num_free,
            num_blocks_cached=cache.num_cached,
            num_blocks_in_use=cache.num_in_use,
            num_steps=counters.num_steps,
            prompt_tokens_computed=counters.prompt_tokens_computed,
            prompt_tokens_cached=counters.prompt_tokens_cached,
            output_tokens=counters.output_tokens,
            num_preemptions=counters.num_preemptions,
            tokens_evicted=cache.num_evicted_blocks * cache.block_size,
            model_s=self._model_s,
        )


def _admitted(request: Request) -> Admitted:
    return Admitted(request.request_id, request.choice, request.seed)


def _chunk(new: NewToken, result: StepResult, row: int) -> TokenChunk:
    request = new.request
    wanted = request.params.logprobs
    return TokenChunk(
        request.request_id,
        request.choice,
        [] if new.token_id is None else [new.token_id],
        None if wanted is None or new.token_id is None else [_logprobs(result, row, wanted)],
        request.num_cached or 0,
        new.finish_reason,
        new.stop_token_id,
    )


def _prompt_chunk(row: StepRow, scores: TokenScores) -> TokenChunk:
    request = row.request
    columns = scores.logprobs.tolist(), scores.top_ids.tolist(), scores.top_logprobs.tolist()
    return TokenChunk(
        request.request_id,
        request.choice,
        [],
        cached_tokens=request.num_cached or 0,
        prompt_logprobs=list(map(TokenLogprobs, *columns)),
    )


def _logprobs(result: StepResult, row: int, wanted: int) -> TokenLogprobs:
    assert result.logprobs is not None, "the runner left out log-probabilities that were asked for"
    own = float(result.logprobs[row])
    if wanted == 0 or result.top_ids is None or result.top_logprobs is None:
        return TokenLogprobs(own, [], [])
    return TokenLogprobs(
        own, result.top_ids[row, :wanted].tolist(), result.top_logprobs[row, :wanted].tolist()
    )
