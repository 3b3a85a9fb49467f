"""Decides what every step computes, and keeps the books of blocks and requests."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterable, Iterator

import numpy as np

from engine.core.messages import AdapterRef
from engine.errors import EngineError, InvalidRequest, Overloaded
from engine.sampling.params import SamplingParams
from engine.scheduling.adapter_queue import AdapterLine
from engine.scheduling.admission import Load, check_choices, check_place, make_room, max_known_tokens
from engine.scheduling.counters import SchedulerCounters
from engine.scheduling.drafts import Drafts
from engine.scheduling.fair_queue import FairQueue
from engine.scheduling.matcher import Matcher
from engine.scheduling.output_tokens import NewToken, OutputTokens
from engine.scheduling.request import Request, with_room
from engine.scheduling.request_blocks import PrefixCache, RequestBlocks
from engine.scheduling.settings import SchedulerSettings
from engine.scheduling.step_plan import StepPlan, StepResult, StepRow
from engine.scheduling.step_time import StepTimeModel
from engine.scheduling.steps_under_way import StepsUnderWay
from engine.scheduling.waiting_queue import WaitingQueue


class Scheduler:
    """Continuous batching: one token budget a step, no phases, computed tokens catch up with known.

    All decoding requests are in every step; the rest of the budget goes to prefill, oldest
    admission first. `schedule` and `update` (or `abandon`) are called in turns; `submit` and the
    cancels between steps. Blocks are conserved: free + cached + in use = total after every call.

    Where `may_run_ahead`, one more step may be scheduled before the `update` of the last one (see
    `steps_under_way`).

    Progress: of the running requests that wait for nobody's block, the oldest can always take the
    blocks of the younger ones, and any request fits the pool when it is alone (see `admission`).
    Whoever waits for a block waits for a request that does not wait (see `block_claims`).

    Cost: under 100 us a step for 16 decoding requests.
    """

    def __init__(
        self,
        settings: SchedulerSettings,
        cache: PrefixCache,
        *,
        clock: Callable[[], float] = time.monotonic,
        adapters: AdapterLine[Request] | None = None,
        held: Callable[[str], tuple[int, int]] | None = None,
    ) -> None:
        """`held`: choices and prompt tokens of a client that will be submitted later, but wait already."""
        self.settings = settings
        self.counters = SchedulerCounters()
        self._cache = cache
        self._block_size = cache.block_size
        self._blocks = RequestBlocks(cache)
        self._output = OutputTokens(settings, self.counters)
        self._drafts = Drafts(settings, self._blocks, cache.block_size, self.counters)
        self._clock = clock
        self._adapters = adapters
        self._held = held
        policy = settings.schedule_policy
        self._waiting = FairQueue(lambda: WaitingQueue(policy, self._blocks.cached_prefix_len))
        self._displaced: list[str] = []
        self._running: dict[Request, None] = {}
        self._live: dict[str, dict[int, Request]] = {}
        self._step_time = StepTimeModel()
        self._arrivals = itertools.count()
        self._admitted: list[Request] = []
        self._refused: dict[str, EngineError] = {}
        self._num_alone = 0  # live choices that run alone
        self._turn = 0
        self._rows: dict[Request, StepRow] = {}
        self._prefill_tokens = 0
        self._under_way = StepsUnderWay(settings)
        self._must_wait = False
        self._last_update_s = 0.0

    # --- requests come and go

    def submit(
        self,
        request_id: str,
        prompt: np.ndarray,
        params: SamplingParams,
        *,
        seed: int,
        n: int = 1,
        namespace: str = "",
        priority: int = 0,
        runs_alone: bool = False,
        make_matcher: Callable[[frozenset[int]], Matcher] | None = None,
        adapter: AdapterRef | None = None,
        client: str = "",
        weight: float = 1.0,
        trace_id: str = "",
    ) -> list[Request]:
        """Queue the n choices of a prompt; those that have nothing to do are finished and not queued.

        With `max_tokens` 0 that is all of them, but for the first if the prompt is to be scored:
        the first choice scores the prompt for all. `make_matcher` makes the
        constraint of a choice, given the tokens that may end it.

        Raises: `InvalidRequest` when it can never be served, `Overloaded` when there is no place.
        """
        pool_tokens = self._cache.num_blocks * self._block_size
        max_known = max_known_tokens(prompt, params, self.settings, pool_tokens)
        if adapter is not None and self._adapters is None:
            raise InvalidRequest("Invalid request: this engine takes no adapters", param="lora_path")
        if request_id in self._live:
            raise InvalidRequest(f"Invalid request: the request id {request_id!r} is in use")
        num_scores = params.num_prompt_scores(len(prompt))
        nothing_to_do = max_known == len(prompt) and not num_scores
        if nothing_to_do:
            check_choices(n, self.settings.max_running_requests + self.settings.max_queued_requests)
        else:
            self._find_place(n, len(prompt), client, weight)
        stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= frozenset(self.settings.eos_token_ids)
        choices = [
            Request(
                request_id=request_id,
                choice=choice,
                params=params,
                seed=seed,
                namespace=namespace,
                token_ids=with_room(prompt, max_known),
                block_table=np.empty(-(-max_known // self._block_size), np.int32),
                prompt_len=len(prompt),
                num_known=len(prompt),
                max_known=max_known,
                arrival=next(self._arrivals),
                priority=priority,
                runs_alone=runs_alone,
                adapter_ref=adapter,
                client=client,
                weight=weight,
                trace_id=trace_id,
                stop_ids=stop_ids,
                num_to_score=0 if choice or not num_scores else len(prompt) - 1,
                num_scored=0 if choice or not num_scores else len(prompt) - 1 - num_scores,
                matcher=None if make_matcher is None else make_matcher(stop_ids),
                num_sent=len(prompt),
            )
            for choice in range(n)
        ]
        for request in choices:
            self._output.append_forced(request)
        todo = [request for request in choices if not request.asks_for_nothing]
        if todo:
            self._live[request_id] = {request.choice: request for request in todo}
            self._num_alone += runs_alone * len(todo)
            for request in todo:
                if adapter is None or self._adapters is None:
                    self._waiting.push(request)
                else:
                    self._adapters.push(request)
        return choices

    def cancel(self, request_id: str) -> None:
        """End all choices of a request; unknown ids are ignored."""
        for request in list(self._live.get(request_id, {}).values()):
            self._end(request)

    def cancel_choice(self, request_id: str, choice: int) -> None:
        """End one choice; unknown ones are ignored."""
        request = self._live.get(request_id, {}).get(choice)
        if request is not None:
            self._end(request)

    def take_displaced(self) -> list[str]:
        """Ids of waiting requests that were ended since the last call, to make room for another client's."""
        displaced, self._displaced = self._displaced, []
        return displaced

    def _find_place(self, n: int, prompt_len: int, client: str, weight: float) -> None:
        """Raises: `Overloaded` when there is no place, nor one that another client has too much of."""
        load = self._load(client)

        def check(gone: list[Request]) -> None:
            check_place(n, prompt_len, load.without(gone), self.settings)

        def groups() -> Iterator[Collection[Request]]:
            displaceable = self._waiting.displaceable(client, weight, n)
            for request_id in dict.fromkeys(r.request_id for r in displaceable):
                choices = self._live[request_id].values()
                if not any(r in self._running or r.was_admitted for r in choices):
                    yield choices

        displaced = dict.fromkeys(r.request_id for r in make_room(check, groups()))
        for request_id in displaced:
            self.cancel(request_id)
        self._displaced += displaced

    def _load(self, client: str) -> Load:
        """As it is for a client: what others hold back keeps it from nothing."""
        num_tokens = 0
        if self.settings.max_queued_tokens is not None:
            held_tokens = 0 if self._held is None else self._held(client)[1]
            num_tokens = held_tokens + sum(r.prompt_len for r in self.waiting if r.choice == 0)
        return Load(len(self._running), self.num_waiting, num_tokens)

    def check_tokens(self, n: int, prompt_len: int, client: str) -> None:
        """Whether a request may be held back that waits for something else than a slot first.

        Raises: `Overloaded` when the client has too many tokens waiting; others may have to make room later.
        """
        most = self.settings.max_queued_tokens
        if most is None or self._held is None:
            return
        num_held, num_tokens = self._held(client)
        num_tokens += sum(r.prompt_len for r in self.waiting if r.choice == 0 and r.client == client)
        num_live = len(self._running) + self.num_waiting + num_held + n
        if num_live > self.settings.max_running_requests and num_tokens + prompt_len > most:
            raise Overloaded("The request queue holds too many tokens.", slug="queue_full")

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    @property
    def running(self) -> Iterable[Request]:
        return self._running

    @property
    def waiting(self) -> Iterable[Request]:
        return itertools.chain(self._waiting, self._adapters or ())

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + (0 if self._adapters is None else len(self._adapters))

    def take_admitted(self) -> list[Request]:
        """Choices that got a running slot for the first time since the last call."""
        admitted, self._admitted = self._admitted, []
        return admitted

    def take_refused(self) -> list[tuple[str, EngineError]]:
        """Requests whose adapter could not be had since the last call; they are over."""
        refused, self._refused = self._refused, {}
        return list(refused.items())

    def flush_cache(self) -> None:
        """Evict every block that no request holds."""
        self._cache.flush()

    # --- one step

    def schedule(self) -> StepPlan | None:
        """What to compute now; None when nothing can be, or not before the `update` of the last step."""
        if self._under_way and not self.may_run_ahead:
            return None
        self._must_wait, self._rows = False, {}
        self._queue_those_with_adapter()
        self._admit_waiting()
        for together in self._groups():
            self._plan_rows(together)
            if self._rows:
                break
        if not self._rows or self._must_wait:
            return None
        plan = StepPlan(list(self._rows.values()), num_prefill=self._prefill_tokens, began_s=self._clock())
        self._under_way.begin(plan)
        return plan

    @property
    def may_run_ahead(self) -> bool:
        """Whether the next step can be planned while the last one runs. Not with requests that run alone:
        should the engine die, it must be plain that it was one of theirs."""
        return not self._num_alone and self._under_way.can_be_followed

    def _groups(self) -> list[list[Request]]:
        """Running requests by who may share a step: all, but for those that run alone. They take turns."""
        running = self._under_way.going_on(self._running)
        if not self._num_alone:
            return [running]
        groups: dict[str, list[Request]] = {}
        for request in running:
            groups.setdefault(request.request_id if request.runs_alone else "", []).append(request)
        turns = list(groups.values())
        self._turn += 1
        first = self._turn % max(1, len(turns))
        return turns[first:] + turns[:first]

    def _plan_rows(self, together: list[Request]) -> None:
        rows = self._rows = {}
        for request in together:
            if request.is_started and request.num_known + request.num_drawn - request.num_computed == 1:
                self._add_row(request, 1)
        most = self._most_prefill(num_decodes=len(rows))
        # Never none, so that prefill always gets on.
        budget = max(most, min(self._block_size, self.settings.chunked_prefill_size))
        self._prefill_tokens = 0
        # Forced text of an answer is short, and its reader waits for it: it goes before prompts.
        for request in sorted(together, key=lambda request: not request.is_decoding):
            if self._prefill_tokens >= budget:
                break
            if request in self._running and request not in rows:
                self._prefill_tokens += self._add_row(request, budget - self._prefill_tokens)
        left = most - self._prefill_tokens
        self._prefill_tokens += self._drafts.add(rows.values(), len(self._running), left)

    def update(self, plan: StepPlan, result: StepResult) -> list[NewToken | None]:
        """Book the results of a step whose drafts are accepted or not; one entry a growing row, in order:
        None for one whose request has ended since it was scheduled, or that is overtaken."""
        self._under_way.end(plan)
        now_s = self._clock()
        self._step_time.observe(plan.num_prefill, now_s - max(plan.began_s, self._last_update_s))
        self._last_update_s = now_s
        counters = self.counters
        counters.num_steps += 1
        drawn, first = result.token_ids.tolist(), 0
        news: list[NewToken | None] = []
        for row in plan.rows:
            request = row.request
            if request not in self._running or row.is_overtaken:
                first += row.num_draws
                news += [None] * (row.samples or row.forced)
                continue
            end = row.start + row.num_tokens - row.num_drafts + row.num_accepted
            request.num_computed += row.num_accepted
            request.num_drawn -= row.samples
            if row.num_drafts:
                self._drafts.book(row)
            if row.scored:
                request.num_scored = row.scored.stop
                request.num_sent = max(request.num_sent, row.scored.stop + 1)
            if row.start < request.prompt_len:
                counters.prompt_tokens_computed += min(end, request.prompt_len) - row.start
            self._blocks.share(request, end)
            if row.samples or row.forced:
                token_id = request.take_forced() if row.forced else drawn[first + row.num_accepted]
                first += row.num_draws
                new = self._output.append(request, token_id)
                if new.finish_reason is not None:
                    self._end(request)
                news.append(new)
        self._under_way.drop_overtaken()
        if self.settings.debug_checks:
            self.check()
        return news

    def abandon(self, plan: StepPlan) -> list[str]:
        """End every request of a step that failed; their ids. What they computed before is kept."""
        self._under_way.end(plan)
        rows = [row for row in plan.rows if row.request in self._running]
        request_ids = list(dict.fromkeys(row.request.request_id for row in rows))
        for request_id in request_ids:
            self.cancel(request_id)
        if self.settings.debug_checks:
            self.check()
        return request_ids

    def is_running(self, request: Request) -> bool:
        return request in self._running

    def check(self) -> None:
        """Audit the books. Raises: `AssertionError`. Cost: linear in blocks."""
        self._blocks.check(self._running, self._waiting)
        if self._adapters is not None:
            self._adapters.check()

    # --- admission

    def _queue_those_with_adapter(self) -> None:
        if self._adapters is None:
            return
        ready = self._adapters.take_ready()
        for request in ready:
            self._waiting.push(request)
        for request in ready:  # one that ended with another choice of its request has given its adapter back
            if request.adapter is not None and request.adapter.error is not None:
                self._refused[request.request_id] = request.adapter.error
                self.cancel(request.request_id)

    def _admit_waiting(self) -> None:
        num_lacking: int | None = None
        while len(self._running) < self.settings.max_running_requests:
            request = self._waiting.peek()
            if request is None:
                return
            if num_lacking is None:
                num_lacking = sum(map(self._blocks.num_lacking, self._running))
            if not self._reserve(request, num_lacking):
                return
            num_lacking += self._blocks.num_lacking(request)
            self._waiting.pop()
            self._running[request] = None
            if not request.was_admitted:
                request.was_admitted = True
                self._admitted.append(request)

    def _reserve(self, request: Request, num_lacking: int) -> bool:
        """Lock what is cached of a waiting request, if there is room for all that it lacks.

        Room is counted so that every running request, too, can finish its prefill and then
        decode through one more block: admission rarely leads to preemption. They lack `num_lacking` blocks.
        """
        self._blocks.take_cached_prefix(request)
        if num_lacking + self._blocks.num_lacking(request) <= self._blocks.num_available:
            return True
        self._blocks.release(request)
        return False

    def _most_prefill(self, num_decodes: int) -> int:
        """Tokens of prefill and of drafts that this step has time for."""
        most = self.settings.chunked_prefill_size - num_decodes
        if num_decodes and self.settings.target_itl_s is not None:
            most = self._step_time.prefill_tokens_within(self.settings.target_itl_s, most)
        return most

    # --- one request's share of a step

    def _add_row(self, request: Request, most: int) -> int:
        """Plan up to `most` of a request's pending tokens; how many."""
        if not request.is_started and not self._start(request):
            return 0
        start, size = request.num_computed, self._block_size
        known = request.num_known + request.num_drawn
        end = min(known, start + most)
        if end < known and end // size * size > start:
            end = end // size * size  # whole blocks, which others may be waiting for
        if end > request.num_blocks * size:
            end = min(end, self._grow(request, end))
        if end <= start:
            return 0
        is_last, is_forced = end == known, request.is_next_forced
        row = StepRow(request, start, end - start, is_last and not is_forced, forced=is_last and is_forced)
        row.is_ahead = end > request.num_known
        self._rows[request] = row
        if request.is_scoring:
            row.scored = range(max(start, request.num_scored), min(end, request.num_to_score))
        return end - start

    def _start(self, request: Request) -> bool:
        """Whether a request can compute now; not while another is computing its next block."""
        if not self._blocks.start(request):
            return False
        request.is_started = True
        if request.num_cached is None:
            size = self._block_size  # whether forced text was known already makes no difference
            request.num_cached = min(request.num_computed, (request.prompt_len - 1) // size * size)
            self.counters.prompt_tokens_cached += request.num_cached
        return True

    def _grow(self, request: Request, end: int) -> int:
        """Give a request blocks up to position `end`, or as many as there are; the end reached.

        When none is left, the youngest running request is preempted; if that is this one, it keeps
        what it has and stands still until an older one takes that, or finishes. Nor is one preempted while
        its step runs: there is no plan then before that is over.
        """
        while self._blocks.num_available == 0:
            youngest = max(self._running, key=lambda r: r.arrival)
            if youngest is request:
                return request.num_blocks * self._block_size
            if self._under_way:
                self._must_wait = True
                return request.num_blocks * self._block_size
            self._preempt(youngest)
        return self._blocks.extend(request, end)

    # --- giving back

    def _preempt(self, request: Request) -> None:
        """Take everything from a running request; it will compute again what is not cached then."""
        self._rows.pop(request, None)
        del self._running[request]
        self._waiting.left(request)
        self._blocks.release(request)
        request.num_preemptions += 1
        self.counters.num_preemptions += 1
        self._waiting.push_preempted(request)

    def _end(self, request: Request) -> None:
        if request in self._running:
            del self._running[request]
            self._waiting.left(request)
        elif self._adapters is None or request not in self._adapters:
            self._waiting.remove(request)
        self._blocks.release(request)
        request.matcher = None  # it may be large, and others remember requests for a while
        if self._adapters is not None:
            self._adapters.release(request)
        self._num_alone -= request.runs_alone
        choices = self._live[request.request_id]
        del choices[request.choice]
        if not choices:
            del self._live[request.request_id]
