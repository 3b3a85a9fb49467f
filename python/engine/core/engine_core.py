"""The engine without its process: messages in, one step, messages out."""

from __future__ import annotations

import logging
import secrets
import select
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from engine.core.constraints import MATCHER_FAILED, ConstrainedRequests, matcher_maker, refused
from engine.core.cpu_clock import CpuClock, process_cpu_s
from engine.core.embedding_core import EmbeddingCore
from engine.core.messages import (
    AdapterLoaded,
    Admitted,
    CacheFlushed,
    CancelChoice,
    CancelRequest,
    DumpState,
    EmbedRequest,
    EngineStats,
    Failed,
    FlushCache,
    GenerateRequest,
    LoadAdapter,
    StateDump,
    StatsRequest,
    ToEngine,
    TokenChunk,
    ToServer,
    UnloadAdapter,
    UnpinAdapter,
)
from engine.core.state_dump import describe_engine
from engine.core.step_board import StepBoard
from engine.core.step_masks import StepMasks
from engine.core.token_chunks import chunk_of, scored_chunks, was_told
from engine.errors import DeviceLost, EngineError, InternalError, InvalidRequest
from engine.grammar.compiler import CompiledGrammar, GrammarCompiler
from engine.log import request_name
from engine.scheduling.adapter_queue import AdapterQueue
from engine.scheduling.admission import displaced_error
from engine.scheduling.request import Request
from engine.scheduling.request_blocks import PrefixCache
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.settings import SchedulerSettings
from engine.scheduling.step_plan import Runner, StepPlan, StepResult, Wait

if TYPE_CHECKING:
    from engine.adapters.adapter_pool import AdapterPool
    from engine.scheduling.matcher import Matcher

logger = logging.getLogger(__name__)

_NAP_S = 0.1
"""Longest sleep of `EngineCore.wait`, whose caller may have other things to look after."""
SHORT_STEP_S = 0.01
"""Of a step that is expected to be shorter, nothing is said before its result: two messages cost more."""
LOAD_WAIT_S = 0.005
"""How long messages may lie while an engine that has nothing to compute waits for an adapter."""


class _UnderWay(NamedTuple):
    """A step that was launched. Waiting for it may fail it."""

    plan: StepPlan
    wait: Wait
    began_s: float


class EngineCore:
    """Scheduler and runner in one thread. `handle` takes messages between steps; `step` answers.

    With an `embedding` core, steps of both kinds take turns: while both have work, embedding gets
    as much time as the step of generation before it took, so neither slows the other to less than half.

    Every accepted request ends in exactly one result for each choice, or in one `Failed`; a
    request that is cancelled ends in silence. A step whose runner raises fails the requests of that
    step, a matcher that raises fails its own, and the engine goes on with the others. `board` tells a
    supervisor who is being computed.
    Where the scheduler may run ahead, `step` launches a step and then waits for the one before it, whose
    tokens it returns: a GPU has work while they are booked and sent and the step after is planned. Where
    constraints need those tokens, the waiting comes between the launch of the model and that of the drawing.
    `use_idle_time` does a piece of what can be done when there is no work, and tells whether there was any.
    `adapter_queue`, on `adapters`, is the one where the `embedding` core has its line.
    """

    def __init__(
        self,
        settings: SchedulerSettings,
        runner: Runner,
        cache: PrefixCache,
        *,
        grammars: GrammarCompiler | None = None,
        adapters: AdapterPool | None = None,
        adapter_queue: AdapterQueue | None = None,
        embedding: EmbeddingCore | None = None,
        board: StepBoard | None = None,
        cpu_clock: CpuClock | None = None,
        use_idle_time: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
        draw_seed: Callable[[], int] = lambda: secrets.randbits(53),  # exact in every JSON reader
    ) -> None:
        if adapters is not None and adapter_queue is None:
            adapter_queue = AdapterQueue(adapters)
        line = None if adapter_queue is None else adapter_queue.line()
        self.cpu_clock = cpu_clock
        self.use_idle_time = use_idle_time
        places = settings.max_running_requests + settings.max_queued_requests
        self._constrained = None if grammars is None else ConstrainedRequests(grammars, places)
        held = None if self._constrained is None else self._constrained.held
        self._scheduler = Scheduler(settings, cache, clock=clock, adapters=line, held=held)
        self._adapters = adapters
        self._runner = runner
        self._cache = cache
        self._embedding = embedding
        self._clock = clock
        self._draw_seed = draw_seed
        self._outbox: list[ToServer] = []
        self._board = board
        self._schedule_s = self._model_s = self._update_s = 0.0
        self._masks = StepMasks(settings.max_running_requests, settings.vocab_size)
        self._last_step_s = self._settled_s = 0.0
        self._last_computed = 0, 0.0
        """Tokens and seconds of the last step of generation."""
        self._under_way: list[_UnderWay] = []

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to compute or to say."""
        is_loading = self._adapters is not None and self._adapters.is_loading
        is_busy = self._scheduler.has_work or bool(self._under_way)
        return is_busy or bool(self._outbox) or is_loading or bool(self._embedding)

    @property
    def wake_fd(self) -> int | None:
        """Readable when there is work that no message brings: a constraint has been compiled."""
        return None if self._constrained is None else self._constrained.wake_fd

    def warm_up(self) -> None:
        """Prepare for what requests may ask for later, while there is nothing else to do."""
        if self._constrained is not None:
            self._constrained.warm_up()

    def wait(self) -> None:
        """Sleep until there is work, if a constraint is being compiled. For callers without a loop."""
        if not self.has_work and self._constrained is not None and len(self._constrained):
            select.select([self._constrained.wake_fd], [], [], _NAP_S)

    def handle(self, message: ToEngine) -> None:
        """Take one message; answers come with the next step. `Shutdown` is the caller's business."""
        match message:
            case GenerateRequest():
                self.submit(message)
            case EmbedRequest():
                self._submit_embedding(message)
            case CancelRequest():
                self._scheduler.cancel(message.request_id)
                if self._constrained is not None:
                    self._constrained.cancel(message.request_id)
                if self._embedding is not None:
                    self._embedding.cancel(message.request_id)
            case CancelChoice():
                self._scheduler.cancel_choice(message.request_id, message.choice)
                if self._constrained is not None:
                    self._constrained.cancel_choice(message.request_id, message.choice)
            case StatsRequest():
                self._outbox.append(self.stats())
            case DumpState():
                self._outbox.append(StateDump(self.dump_state()))
            case FlushCache():
                self._outbox.append(CacheFlushed(self.flush()))
            case LoadAdapter() if self._adapters is None:
                error = "the model takes no adapters"
                self._outbox.append(
                    AdapterLoaded(message.directory, error=error, slug="unsupported_parameter")
                )
            case LoadAdapter():
                self._adapters.begin_load(message.directory, message.is_pinned)
            case UnloadAdapter() if self._adapters is not None:
                self._adapters.forget(message.digest)
            case UnpinAdapter() if self._adapters is not None:
                self._adapters.unpin(message.digest)

    def submit(self, request: GenerateRequest) -> None:
        """Queue a request, once its constraint is compiled. A refusal is answered with `Failed`."""
        if request.params.constraint is None:
            self._queue(request, None)
            return
        try:
            if self._constrained is None:
                raise InvalidRequest("Invalid request: this engine serves no constraints")
            grammar = self._constrained.find(request)
            if grammar is None:
                self._scheduler.check_tokens(request.n, len(request.prompt) // 4, request.client)
                self._constrained.hold(request)
        except EngineError as error:
            self._outbox.append(Failed.from_error(request.request_id, error))
            return
        if grammar is not None:
            self._queue(request, grammar)

    def _queue_compiled(self) -> None:
        """Queue the requests whose constraint has been compiled."""
        if self._constrained is None:
            return
        for request, result, cancelled in self._constrained.take_ready():
            if isinstance(result, EngineError):
                self._outbox.append(Failed.from_error(request.request_id, result))
                continue
            self._queue(request, result)
            for choice in cancelled:
                self._scheduler.cancel_choice(request.request_id, choice)

    def _queue(self, request: GenerateRequest, grammar: CompiledGrammar | None) -> None:
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
                namespace=_namespace(request),
                priority=request.priority,
                runs_alone=request.runs_alone,
                make_matcher=matcher_maker(request, grammar),
                adapter=request.adapter,
                client=request.client,
                weight=request.weight,
                trace_id=request.trace_id,
            )
        except EngineError as error:
            self._outbox.append(Failed.from_error(request.request_id, error))
            choices = []
        for request_id in self._scheduler.take_displaced():
            self._outbox.append(Failed.from_error(request_id, displaced_error()))
        for choice in choices:
            if choice.asks_for_nothing:
                self._outbox.append(_admitted(choice))
                self._outbox.append(TokenChunk(choice.request_id, choice.choice, [], finish_reason="length"))

    def _submit_embedding(self, request: EmbedRequest) -> None:
        try:
            if self._embedding is None:
                raise InvalidRequest("Invalid request: this engine does not embed", param="model")
            self._outbox += self._embedding.submit(request)
        except EngineError as error:
            self.refuse(request.request_id, error)

    def refuse(self, request_id: str, error: EngineError) -> None:
        """Answer a request with an error, at the next step."""
        self._outbox.append(Failed.from_error(request_id, error))

    def step(self, announce: Callable[[list[ToServer]], None] | None = None) -> list[ToServer]:
        """Launch one step, if there is anything to compute; everything to say since the last one.

        `announce` takes what can be said before the computing: refusals, and who is admitted, so that
        a client hears of it at once and not after a chunk of prefill, unless that is short.
        """
        self._queue_compiled()
        if self._embedding:
            self._outbox += self._embedding.step(self._last_step_s)
            self._last_step_s = 0.0
        began_s = self._clock()
        plan = self._scheduler.schedule()
        self._schedule_s += self._clock() - began_s
        self._outbox.extend(map(_admitted, self._scheduler.take_admitted()))
        if self._adapters is not None:
            can_embed = self._embedding is not None and self._embedding.can_compute
            is_idle = plan is None and not can_embed and not self._under_way
            self._attend_adapters(self._adapters, is_idle=is_idle)
        if announce is not None and plan is not None and self._outbox and not self._is_short(plan):
            announce(self._take_outbox())
        if plan is not None:
            self._launch(plan)
        goes_on = plan is not None and bool(self._under_way) and self._scheduler.may_run_ahead
        self._settle_all_but(1 if goes_on else 0)
        return self._take_outbox()

    def _is_short(self, plan: StepPlan) -> bool:
        """Whether the time of the last step says that this one takes hardly any."""
        num_tokens, seconds = self._last_computed
        return num_tokens > 0 and seconds * max(1.0, plan.num_tokens / num_tokens) < SHORT_STEP_S

    def _attend_adapters(self, adapters: AdapterPool, *, is_idle: bool) -> None:
        """Tell what came of loads. With nothing to compute, wait a little for them rather than turn round."""
        for request_id, error in self._scheduler.take_refused():
            self._outbox.append(Failed.from_error(request_id, error))
        if is_idle and adapters.is_loading and not self._outbox:
            adapters.wait(LOAD_WAIT_S)
        self._outbox.extend(adapters.take_answers())

    def _launch(self, plan: StepPlan) -> None:
        began_s = self._clock()
        self._show_on_board([*(step.plan for step in self._under_way), plan])
        try:
            if plan.has_late_masks:
                wait = self._runner.launch(plan, before_draws=lambda: self._catch_up(plan))
            else:
                self._masks.fill(plan)
                wait = self._runner.launch(plan)
            self._under_way.append(_UnderWay(plan, wait, began_s))
        except DeviceLost:
            raise  # nobody can be served any more
        except Exception:
            self._settle_all_but(0)  # the step before is none the worse for it
            self._give_up(plan)
            self._show_on_board([])

    def _catch_up(self, plan: StepPlan) -> None:
        """Settle what runs, then ask what may be drawn in `plan`, whose model is launched already."""
        self._settle_all_but(0)
        self._show_on_board([plan])
        self._masks.fill(plan)

    def _settle_all_but(self, count: int) -> None:
        while len(self._under_way) > count:
            self._settle(self._under_way.pop(0))
            self._show_on_board([step.plan for step in self._under_way])

    def _settle(self, step: _UnderWay) -> None:
        """Wait for a step, and say what came of it."""
        plan = step.plan
        try:
            result = step.wait()
            plan.accept(result.token_ids)
            self._masks.advance(plan, result.token_ids.tolist())
        except DeviceLost:
            raise
        except Exception:
            self._give_up(plan)
            return
        computed_s = self._clock()
        self._last_step_s = computed_s - max(step.began_s, self._settled_s)
        self._last_computed = plan.num_tokens, self._last_step_s
        self._model_s += self._last_step_s
        self._settled_s = computed_s
        for row, scores in zip(plan.scored_rows, result.scores, strict=True):
            if self._scheduler.is_running(row.request):
                self._outbox.extend(scored_chunks(row, scores))
        self._tell(plan, result)
        self._update_s += self._clock() - computed_s

    def _tell(self, plan: StepPlan, result: StepResult) -> None:
        """Book a step, and say what is new. Nothing follows the `Failed` of a request."""
        rows = plan.growing_rows
        matchers = [row.request.matcher for row in rows]  # who is at an end has none any more
        first, failed = 0, set()
        for row, matcher, new in zip(rows, matchers, self._scheduler.update(plan, result), strict=True):
            if new is not None and new.request.request_id not in failed:
                if new.finish_reason == "error" or (matcher is not None and matcher.has_failed):
                    failed.add(new.request.request_id)
                    self._outbox.append(self._fail(new.request, matcher))
                elif not was_told(new):
                    self._outbox.append(chunk_of(new, result, range(first, first + row.num_accepted + 1)))
            first += row.num_draws

    def _give_up(self, plan: StepPlan) -> None:
        """End the requests of a step that failed, with the error that is being handled."""
        requests = dict.fromkeys(_name(row.request) for row in plan.rows)
        text = "a step of %d tokens failed, and with it %s"
        logger.exception(text, plan.num_tokens, ", ".join(requests))
        error = InternalError("The engine failed while it computed this request.")
        for request_id in self._scheduler.abandon(plan):
            self._outbox.append(Failed.from_error(request_id, error))

    def _show_on_board(self, plans: list[StepPlan]) -> None:
        """Who is being computed."""
        if self._board is None:
            return
        request_ids = [row.request.request_id for plan in plans for row in plan.rows]
        if request_ids:
            self._board.begin_step(dict.fromkeys(request_ids))
        else:
            self._board.end_step()

    def _fail(self, request: Request, matcher: Matcher | None) -> Failed:
        request_id = request.request_id
        self._scheduler.cancel(request_id)
        if matcher is None:
            logger.error("no token can be drawn for %s: the model computes nothing but NaN", _name(request))
            return Failed.from_error(request_id, InternalError("The model computed no usable numbers."))
        if matcher.has_failed:
            return Failed.from_error(request_id, InternalError(MATCHER_FAILED))
        if matcher.excess:
            return Failed.from_error(request_id, refused(request.params, matcher.excess))
        reason = "No token of the vocabulary can continue this answer as its constraint demands."
        return Failed.from_error(request_id, InternalError(reason))

    def dump_state(self) -> bytes:
        """What it is busy with, as JSON."""
        compiling = () if self._constrained is None else self._constrained.waiting
        return msgspec.json.encode(describe_engine(self._scheduler, self._cache, self._embedding, compiling))

    def flush(self) -> bool:
        """Empty the prefix cache, unless requests run or wait; whether it was done."""
        if self._scheduler.has_work or (self._constrained is not None and len(self._constrained)):
            return False
        self._scheduler.flush_cache()
        return True

    def close(self) -> None:
        """Stop what runs beside the engine; nothing else can be called afterwards."""
        if self._constrained is not None:
            self._constrained.close()
        if self._adapters is not None:
            self._adapters.close()

    def _take_outbox(self) -> list[ToServer]:
        messages, self._outbox = self._outbox, []
        return messages

    def stats(self) -> EngineStats:
        """Where things stand between two steps."""
        scheduler, cache, counters = self._scheduler, self._cache, self._scheduler.counters
        num_compiling = 0 if self._constrained is None else len(self._constrained)
        num_embedding = 0 if self._embedding is None else len(self._embedding)
        num_embedding_now = 0 if self._embedding is None else self._embedding.queue.num_running
        return EngineStats(
            num_running=scheduler.num_running + num_embedding_now,
            num_waiting=scheduler.num_waiting + num_compiling + num_embedding - num_embedding_now,
            num_blocks_total=cache.num_blocks,
            num_blocks_free=cache.num_free,
            num_blocks_cached=cache.num_cached,
            num_blocks_in_use=cache.num_in_use,
            num_steps=counters.num_steps,
            prompt_tokens_computed=counters.prompt_tokens_computed,
            prompt_tokens_cached=counters.prompt_tokens_cached,
            output_tokens=counters.output_tokens,
            draft_tokens=counters.draft_tokens,
            accepted_tokens=counters.accepted_tokens,
            num_preemptions=counters.num_preemptions,
            tokens_evicted=cache.num_evicted_blocks * cache.block_size,
            model_s=self._model_s,
            **({} if self._adapters is None else self._adapters.counts()),
            schedule_s=self._schedule_s,
            update_s=self._update_s,
            num_compiling=num_compiling,
            cpu_s=process_cpu_s(),
            kernel_cpu_s=0.0 if self.cpu_clock is None else self.cpu_clock.kernel_cpu_s(),
        )


def _namespace(request: GenerateRequest) -> str:
    """Where its prefixes are cached: what other weights computed must never be found."""
    if request.adapter is None:
        return request.namespace
    return f"adapter {request.adapter.digest}:{request.namespace}"


def _name(request: Request) -> str:
    return request_name(request.request_id, request.trace_id)


def _admitted(request: Request) -> Admitted:
    return Admitted(request.request_id, request.choice, request.seed)
