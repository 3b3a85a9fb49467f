"""A scheduler, a fake runner and a plain cache wired together, for the scheduler's tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np

from engine.sampling.params import SamplingParams
from engine.scheduling.output_tokens import NewToken
from engine.scheduling.request import Request
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.settings import SchedulerSettings
from engine.scheduling.step_plan import StepPlan, Wait
from helpers.engines import FakeRunner
from helpers.late_device import LateDevice
from helpers.prefix_cache import PlainPrefixCache

GREEDY = SamplingParams(temperature=0)


def prompt(length: int, seed: int = 0, vocab_size: int = 50) -> list[int]:
    """Random token ids, the same for the same seed."""
    return np.random.default_rng(seed).integers(0, vocab_size, length).tolist()


def greedy(**fields) -> SamplingParams:
    return SamplingParams(temperature=0, **fields)


@dataclasses.dataclass
class Answer:
    """What one choice has got so far."""

    token_ids: list[int] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    stop_token_id: int | None = None
    prompt_logprobs: list[float] = dataclasses.field(default_factory=list)


class Harness:
    """Drives a scheduler step by step. Every step is audited, and time is a number the test sets."""

    def __init__(
        self,
        *,
        num_blocks: int = 256,
        block_size: int = 16,
        enabled: bool = True,
        vocab_size: int = 50,
        cache=None,
        **settings,
    ) -> None:
        self.now = 0.0
        self.cache = cache or PlainPrefixCache(num_blocks, block_size, enabled)
        self.runner = FakeRunner(num_blocks, block_size, vocab_size)
        self.device = LateDevice(self.runner) if settings.get("runs_ahead") else self.runner
        self._under_way: list[tuple[StepPlan, Wait]] = []
        values = {
            "context_length": num_blocks * block_size,
            "vocab_size": vocab_size,
            "max_running_requests": 64,
            "max_queued_requests": 1000,
            "chunked_prefill_size": 512,
            "debug_checks": True,
        }
        self.scheduler = Scheduler(
            SchedulerSettings(**(values | settings)), self.cache, clock=lambda: self.now
        )
        self.answers: dict[tuple[str, int], Answer] = {}
        self.num_idle_steps = 0
        self.displaced: list[str] = []
        self.failed: list[str] = []

    def submit(
        self,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams = GREEDY,
        n: int = 1,
        **options,
    ) -> None:
        prompt = np.array(prompt, np.int32)
        seed = 7 if params.seed is None else params.seed
        choices = self.scheduler.submit(request_id, prompt, params, seed=seed, n=n, **options)
        self.displaced += self.scheduler.take_displaced()
        for request in choices:
            self.answers[request_id, request.choice] = Answer()

    def step(self) -> StepPlan | None:
        """Launch a step, then book it, or the one before where the scheduler runs ahead."""
        decoding = [r for r in self.scheduler.running if is_decoding(r)]
        plan = self.scheduler.schedule()
        self.scheduler.check()
        if plan is not None or not self._under_way:  # else it waits for the tokens of the step that runs
            self._check_shares(decoding, plan)
        if plan is None and not self._under_way:
            self.num_idle_steps += 1
            return None
        self.num_idle_steps = 0
        if plan is not None:
            computed = {row.request.request_id for row in plan.rows}
            assert len(computed) == 1 or not any(row.request.runs_alone for row in plan.rows)
            self._under_way.append((plan, self.device.launch(plan)))
        goes_on = plan is not None and self.scheduler.may_run_ahead
        while len(self._under_way) > goes_on:
            self._settle(*self._under_way.pop(0))
        return plan

    def fail_step(self, is_launched: bool) -> None:
        """Fail the next step, before it is launched, or where it is waited for."""
        plan = self.scheduler.schedule()
        if plan is None:
            return
        if is_launched and self.device is not self.runner:
            self.device.lose_next = RuntimeError("lost")
            self._under_way.append((plan, self.device.launch(plan)))
            while len(self._under_way) > 1:
                self._settle(*self._under_way.pop(0))
            return
        while self._under_way:
            self._settle(*self._under_way.pop(0))
        self.failed += self.scheduler.abandon(plan)

    def _settle(self, plan: StepPlan, wait: Wait) -> None:
        try:
            result = wait()
        except RuntimeError:
            self.failed += self.scheduler.abandon(plan)
            return
        plan.accept(result.token_ids)
        for row, scores in zip(plan.scored_rows, result.scores, strict=True):
            if not self.scheduler.is_running(row.request):
                continue
            answer = self.answers[row.request.request_id, row.request.choice]
            assert len(answer.prompt_logprobs) == row.scored.start, "a position is scored once, in order"
            answer.prompt_logprobs += scores.logprobs.tolist()
        for new in self.scheduler.update(plan, result):
            if new is not None:
                self._take(new)

    def _check_shares(self, decoding: list[Request], plan: StepPlan | None) -> None:
        """Every decoding request is in the step, and what is not decoded keeps within the chunk.

        One that gave its blocks to an older one runs no more; the youngest stands still where none is left.
        Those that run alone, and all others, take turns.
        """
        rows = {} if plan is None else {row.request: row for row in plan.rows}
        turn = {r.request_id if r.runs_alone else "" for r in rows}
        running = list(self.scheduler.running)
        left_out = [r for r in decoding if r not in rows and r in running]
        for request in left_out:
            if not turn or (request.request_id if request.runs_alone else "") in turn:
                assert self.cache.num_free + self.cache.num_cached == 0
                assert request is max(running, key=lambda r: r.arrival)
        if plan is not None:
            chunk = self.scheduler.settings.chunked_prefill_size
            num_decodes = sum(request in rows for request in decoding)
            assert plan.num_tokens - num_decodes <= chunk
            least = min(chunk, self.cache.block_size)  # so that prompts get on beside any number of decodes
            assert plan.num_tokens <= max(chunk, num_decodes + least)

    def run(self, max_steps: int = 10_000) -> None:
        """Until nothing is left. A scheduler that stands still fails the test."""
        for _ in range(max_steps):
            if not self.scheduler.has_work and not self._under_way:
                assert self.cache.num_in_use == 0
                return
            self.step()
            assert self.num_idle_steps < 2, "the scheduler has work and does nothing"
        raise AssertionError(f"not finished after {max_steps} steps")

    def tokens(self, request_id: str, choice: int = 0) -> list[int]:
        return self.answers[request_id, choice].token_ids

    def _take(self, new: NewToken) -> None:
        answer = self.answers[new.request.request_id, new.request.choice]
        assert answer.finish_reason is None, "a token after the last one"
        if new.sampled is not None or new.token_ids:
            answer.token_ids += new.token_ids
        answer.finish_reason, answer.stop_token_id = new.finish_reason, new.stop_token_id


def is_decoding(request: Request) -> bool:
    """Whether one token of it is to be computed now, known or about to be."""
    num_known = request.num_known + request.num_drawn
    is_over = request.num_drawn and num_known >= request.max_known
    return request.is_started and num_known - request.num_computed == 1 and not is_over


def answer_alone(
    prompt: Sequence[int], params: SamplingParams, choice: int = 0, block_size: int = 16, **settings
) -> Answer:
    """The answer of a request that never meets another one, nor a full pool, nor the cache."""
    alone = Harness(num_blocks=1024, block_size=block_size, enabled=False, **settings)
    alone.submit("alone", prompt, params, n=choice + 1)
    alone.run()
    return alone.answers["alone", choice]


class AdapterSlots:
    """`count` places; an adapter is read as soon as it has one, unless it is in `slow` or `broken`.

    Its weights are its digest.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.users: dict[str, int] = {}
        self.slow: set[str] = set()
        self.broken: dict[str, Exception] = {}
        self.lent: list = []

    @property
    def num_in_use(self) -> int:
        return len(self.users)

    def try_take(self, ref):
        if ref.digest not in self.users and len(self.users) >= self.count:
            return None
        self.users[ref.digest] = self.users.get(ref.digest, 0) + 1
        weights = None if ref.digest in self.slow or ref.digest in self.broken else ref.digest
        place = SimpleNamespace(digest=ref.digest, weights=weights, error=self.broken.get(ref.digest))
        self.lent.append(place)
        return place

    def give_back(self, place) -> None:
        self.users[place.digest] -= 1
        if not self.users[place.digest]:
            del self.users[place.digest]

    def settle(self) -> bool:
        done = [p for p in self.lent if p.weights is None and p.error is None and p.digest not in self.slow]
        for place in done:
            place.weights = place.digest
        return bool(done)

    def check(self) -> None:
        pass
