"""Steps that are planned before the tokens of the one before are known: the same answers, without waiting."""

from __future__ import annotations

import dataclasses
import random
from collections import deque

import numpy as np
import pytest

from engine.core.engine_core import EngineCore
from engine.core.messages import Admitted, CancelChoice, CancelRequest, Failed, GenerateRequest, TokenChunk
from engine.core.step_board import StepBoard
from engine.errors import DeviceLost
from engine.sampling.params import SamplingParams
from engine.scheduling.settings import SchedulerSettings
from engine.scheduling.step_plan import StepPlan
from helpers.engines import FakeRunner
from helpers.late_device import LateDevice
from helpers.prefix_cache import PlainPrefixCache
from helpers.scheduling import answer_alone, greedy

BLOCK_SIZE, VOCAB_SIZE, EOS = 4, 50, 3
SETTINGS = SchedulerSettings(
    context_length=200,
    vocab_size=VOCAB_SIZE,
    max_running_requests=8,
    max_queued_requests=1000,
    chunked_prefill_size=16,
    eos_token_ids=(EOS,),
    debug_checks=True,
)


class Spelling:
    """A constraint: each token allows some of those that may follow, and every fifth or so forces some.

    What it was told must be the answer, token by token.
    """

    excess, has_failed, is_over = "", False, False

    def __init__(self) -> None:
        self.forced: deque[int] = deque()
        self.told: list[int] = []
        self.num_forced = 0

    def mask(self, row: np.ndarray) -> np.ndarray:
        last = self.told[-1] if self.told else 0
        allowed = [self.forced[0]] if self.forced else range(last % 3, VOCAB_SIZE, 3)
        row[:] = 0
        for token in allowed:
            row[token >> 5] |= np.uint32(1 << (token & 31)).astype(np.int32)
        return row

    def take(self, token: int) -> None:
        if self.forced:
            assert token == self.forced.popleft()
            return
        self.told.append(token)
        if token % 5 == 0:
            self.forced.extend([7, 20, 31][: 2 + token % 2])
            self.told += self.forced
            self.num_forced += len(self.forced)


class Engine:
    """A core on a device that computes late, and what came out of it. Requests whose name begins with "c" are
    constrained."""

    def __init__(self, *, runs_ahead: bool = True, num_blocks: int = 500, **changes) -> None:
        self.cache = PlainPrefixCache(num_blocks, BLOCK_SIZE)
        self.runner = FakeRunner(num_blocks, BLOCK_SIZE, VOCAB_SIZE)
        self.device = LateDevice(self.runner)
        settings = dataclasses.replace(SETTINGS, runs_ahead=runs_ahead, **changes)
        self.board = StepBoard()
        self.core = EngineCore(
            settings, self.device, self.cache, draw_seed=lambda: 5, board=self.board, clock=lambda: 0.0
        )
        self.matchers: dict[str, list[Spelling]] = {}
        submit = self.core._scheduler.submit

        def constrained(name, *arguments, make_matcher, **options):
            if name.startswith("c"):
                made = self.matchers.setdefault(name, [])
                make_matcher = lambda _: made.append(Spelling()) or made[-1]  # noqa: E731
            return submit(name, *arguments, make_matcher=make_matcher, **options)

        self.core._scheduler.submit = constrained
        self.chunks: dict[tuple[str, int], list[TokenChunk]] = {}
        self.failed: dict[str, Failed] = {}

    def submit(self, name: str, prompt, params: SamplingParams, n: int = 1, **options) -> None:
        prompt = np.array(prompt, "<i4").tobytes()
        self.core.handle(GenerateRequest(name, prompt, params, n, **options))

    def step(self) -> None:
        for message in self.core.step():
            match message:
                case TokenChunk():
                    chunks = self.chunks.setdefault((message.request_id, message.choice), [])
                    assert not chunks or chunks[-1].finish_reason is None, "a chunk behind the last one"
                    chunks.append(message)
                case Failed():
                    assert message.request_id not in self.failed
                    self.failed[message.request_id] = message
                case _:
                    assert isinstance(message, Admitted)

    def run(self, max_steps: int = 5000) -> Engine:
        for _ in range(max_steps):
            if not self.core.has_work:
                self.check_is_idle()
                return self
            self.step()
        raise AssertionError("not finished")

    def check_is_idle(self) -> None:
        stats = self.core.stats()
        assert stats.num_blocks_in_use == 0 and stats.num_running == stats.num_waiting == 0
        assert stats.num_blocks_free + stats.num_blocks_cached == stats.num_blocks_total
        assert self.board.step_request_ids == []
        assert self.device.num_computed == self.device._num_launched, "nothing is left behind"
        assert self.device.broken is None

    def answers(self) -> dict[tuple[str, int], tuple]:
        """All that a choice was given. Scores of a prompt come in chunks, as it was computed."""
        return {
            key: (
                self.tokens(*key),
                [entry for chunk in chunks for entry in chunk.logprobs or ()],
                [entry for chunk in chunks for entry in chunk.prompt_logprobs or ()],
                (chunks[-1].cached_tokens, chunks[-1].finish_reason, chunks[-1].stop_token_id),
            )
            for key, chunks in self.chunks.items()
        }

    def tokens(self, name: str, choice: int = 0) -> list[int]:
        return [token for chunk in self.chunks.get((name, choice), []) for token in chunk.token_ids]


def drawn_params(draw: random.Random, lengths: list[int]) -> SamplingParams:
    max_tokens = draw.choice(lengths)
    return SamplingParams(
        temperature=draw.choice([0.0, 1.0]),
        seed=draw.randrange(9),
        max_tokens=max_tokens,
        min_tokens=draw.choice([0, max_tokens // 2]),
        logprobs=draw.choice([None, None, 0, 3]),
        prompt_logprobs=draw.choice([None, None, None, 2]),
        stop_token_ids=draw.choice([(), (7, 8, 9, 10, 11)]),
        ignore_eos=draw.random() < 0.5,
    )


def workload(
    seed: int, lengths=(1, 2, 9, 30), alone_rate: float = 0.0, names: str = "r"
) -> list[tuple[str, list[int], SamplingParams, int, dict]]:
    draw = random.Random(seed)
    starts = [[draw.randrange(VOCAB_SIZE) for _ in range(length)] for length in (0, 8, 30)]
    return [
        (
            f"{draw.choice(names)}{index}",
            draw.choice(starts) + [draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(1, 20))],
            drawn_params(draw, lengths),
            draw.choice([1, 1, 3]),
            {"runs_alone": draw.random() < alone_rate},
        )
        for index in range(40)
    ]


@pytest.mark.parametrize("seed", range(6))
def test_everything_said_is_what_is_said_without_it(seed):
    """Tokens, log-probabilities, ends and cached tokens."""
    engines = [Engine(runs_ahead=runs_ahead) for runs_ahead in (True, False)]
    for engine in engines:
        for name, prompt, params, n, options in workload(seed):
            engine.submit(name, prompt, params, n, **options)
        engine.run()
    ahead, waiting = engines
    assert ahead.answers() == waiting.answers() and len(ahead.answers()) > 40
    counts = [dataclasses.replace(engine.core._scheduler.counters, num_steps=0) for engine in engines]
    assert counts[0] == counts[1]
    assert waiting.device.num_overlapped == waiting.device.num_late_rows == 0
    assert ahead.device.num_late_rows > 200 and ahead.device.num_overlapped > 30


@pytest.mark.parametrize("jumps", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_constrained_answers_are_those_without_it(seed, jumps):
    """Among free ones, of which none waits for them; what is forced is known only when the next step runs."""
    engines = [Engine(runs_ahead=runs_ahead, jump_forward=jumps) for runs_ahead in (True, False)]
    plans = watch_plans(engines[0])
    for engine in engines:
        for name, prompt, params, n, options in workload(200 + seed, names="rc"):
            engine.submit(name, prompt, params, n, **options)
        engine.run()
    ahead, waiting = engines
    assert ahead.answers() == waiting.answers() and len(ahead.answers()) > 40
    for name, matchers in ahead.matchers.items():
        for choice, matcher in enumerate(matchers):
            answer = ahead.tokens(name, choice)
            assert matcher.told[: len(answer)] == answer and len(matcher.told) <= len(answer) + 3
    overtaken = sum(row.is_overtaken for plan in plans for row in plan.rows)
    assert overtaken > 5 if jumps else overtaken == 0
    assert ahead.device.num_late_masks > 20 and ahead.device.num_late_rows > 200


def watch_plans(engine: Engine) -> list[StepPlan]:
    """All that are launched from now on."""
    plans: list[StepPlan] = []
    launch = engine.device.launch

    def watched(plan: StepPlan, before_draws=None):
        plans.append(plan)
        return launch(plan, before_draws)

    engine.device.launch = watched
    return plans


def test_no_step_waits_for_a_constrained_answer():
    """The model of each is launched before the one before is waited for, forced text or not."""
    engine = Engine()
    plans = watch_plans(engine)
    for index in range(6):
        name, params = "rc"[index % 2], SamplingParams(seed=index, max_tokens=40, ignore_eos=True)
        engine.submit(f"{name}{index}", range(index, 10 + index), params)
    engine.run()
    assert sum(row.is_overtaken for plan in plans for row in plan.rows) > 3
    assert engine.device.num_overlapped >= len(plans) - 1
    assert engine.device.num_late_masks > len(plans) // 2


@pytest.mark.parametrize("seed", range(8))
def test_whatever_comes_between(seed):
    """Few blocks, cancels of all kinds at any time, steps that fail: what is answered is the right answer."""
    draw = random.Random(seed)
    engine = Engine(num_blocks=40)
    asked, cancelled = {}, set()
    plain = Engine(runs_ahead=False, num_blocks=3000, debug_checks=False)
    mix = workload(100 + seed, lengths=(30, 60, 90), alone_rate=0.02, names="rrc")
    for name, prompt, params, n, options in mix:
        asked[name] = n
        plain.submit(name, prompt, params, n)
        engine.submit(name, prompt, params, n, **options)
        for _ in range(draw.randrange(6)):
            engine.step()
        if draw.random() < 0.15:
            victim = draw.choice(list(asked))
            cancelled.update((victim, choice) for choice in range(asked[victim]))
            engine.core.handle(CancelRequest(victim))
        if draw.random() < 0.15:
            victim = draw.choice(list(asked)), draw.randrange(3)
            cancelled.add(victim)
            engine.core.handle(CancelChoice(*victim))
        if draw.random() < 0.03:
            engine.device.lose_next = RuntimeError("when it is waited for")
        if draw.random() < 0.03:
            engine.device.refuse_next = RuntimeError("when it is launched")
    engine.run()
    plain.run()
    assert engine.core.stats().num_preemptions > 0 and engine.device.num_late_rows > 0
    num_whole = 0
    for name, n in asked.items():
        for choice in range(n):
            expected, reason = plain.tokens(name, choice), plain.chunks[name, choice][-1].finish_reason
            chunks = engine.chunks.get((name, choice), [])
            tokens = engine.tokens(name, choice)
            if chunks and chunks[-1].finish_reason is not None:
                num_whole += 1
                assert tokens == expected and chunks[-1].finish_reason == reason
            else:
                assert name in engine.failed or (name, choice) in cancelled
                assert tokens == expected[: len(tokens)]
    assert num_whole > 10


def test_nobody_waits_for_a_step_before_the_next_is_launched():
    """Prompts in chunks, sampling, penalties, log-probabilities, stop tokens, requests that come and go."""
    engine = Engine(chunked_prefill_size=8)
    styles = [{}, {"logprobs": 2}, {"frequency_penalty": 0.5}, {"stop_token_ids": (5, 6)}, {"min_tokens": 4}]
    for index in range(12):
        params = SamplingParams(seed=index, max_tokens=10 + index, **styles[index % len(styles)])
        engine.submit(f"r{index}", range(index, 40 + index), params)
    while engine.core.has_work:
        before = engine.device.num_overlapped
        had_two_steps = bool(engine.core._under_way) and engine.core._scheduler.num_running > 1
        engine.step()
        assert engine.device.num_overlapped > before or not had_two_steps
    assert engine.device.num_overlapped >= engine.runner.num_steps - 2


def test_a_stop_token_is_found_a_step_late_and_leaves_nothing_behind():
    prompt, params = list(range(20)), greedy(max_tokens=30, ignore_eos=True)
    whole = answer_alone(prompt, params, block_size=BLOCK_SIZE).token_ids
    stop = next(token for token in whole[6:] if token not in whole[:6])
    end = whole.index(stop) + 1
    engine = Engine()
    engine.submit("a", prompt, greedy(max_tokens=30, ignore_eos=True, stop_token_ids=(stop,)))
    engine.run()
    assert engine.tokens("a") == whole[:end]
    assert engine.chunks["a", 0][-1].stop_token_id == stop
    assert engine.runner.tokens_computed["a"] == len(prompt) + end, "one row more than tokens were needed"
    stats = engine.core.stats()
    assert stats.output_tokens == end and stats.prompt_tokens_computed == len(prompt)
    in_tree = engine.cache.match_length("", np.array(prompt + whole, np.int32))
    assert (
        in_tree == (len(prompt) + end - 1) // BLOCK_SIZE * BLOCK_SIZE == stats.num_blocks_cached * BLOCK_SIZE
    )


def test_the_last_of_max_tokens_leaves_no_row_behind():
    engine = Engine()
    engine.submit("a", range(20), greedy(max_tokens=7, ignore_eos=True))
    engine.run()
    assert engine.runner.tokens_computed["a"] == 20 + 6


def test_a_request_that_is_cancelled_while_its_step_runs_ends_in_silence():
    engine = Engine()
    for name in "ab":
        engine.submit(name, range(10), greedy(max_tokens=20, ignore_eos=True))
    for _ in range(5):
        engine.step()
    num_chunks, in_use = len(engine.chunks["a", 0]), engine.cache.num_in_use
    engine.core.handle(CancelRequest("a"))
    assert engine.cache.num_in_use < in_use, "blocks are given back at once"
    engine.run()
    assert len(engine.chunks["a", 0]) == num_chunks
    assert (
        engine.tokens("b")
        == answer_alone(range(10), greedy(max_tokens=20, ignore_eos=True), block_size=BLOCK_SIZE).token_ids
    )


def test_no_scores_follow_a_cancel_either():
    engine = Engine()
    engine.submit("a", range(48), SamplingParams(max_tokens=2, prompt_logprobs=1))
    engine.step()
    engine.step()
    assert engine.core._under_way and len(engine.chunks["a", 0]) == 1
    engine.core.handle(CancelRequest("a"))
    engine.run()
    assert len(engine.chunks["a", 0]) == 1


@pytest.mark.parametrize("num_steps", range(2, 12))
def test_an_answer_that_has_ended_does_not_fail(num_steps):
    """Its row in the step that fails was to be thrown away."""
    prompt = list(range(20))
    whole = answer_alone(prompt, greedy(max_tokens=30, ignore_eos=True), block_size=BLOCK_SIZE).token_ids
    engine = Engine(chunked_prefill_size=64)
    engine.submit("a", prompt, greedy(max_tokens=30, ignore_eos=True, stop_token_ids=(whole[5],)))
    engine.submit("b", range(30, 40), greedy(max_tokens=30, ignore_eos=True))
    for _ in range(num_steps):
        engine.step()
    engine.device.lose_next = RuntimeError("no")
    engine.run()
    has_ended = engine.chunks["a", 0][-1].finish_reason == "stop"
    assert has_ended == ("a" not in engine.failed) and "b" in engine.failed


def test_a_step_without_anybody_left_is_waited_for():
    engine = Engine()
    engine.submit("a", range(10), greedy(max_tokens=20))
    engine.step()
    engine.core.handle(CancelRequest("a"))
    assert engine.core.has_work
    engine.run()


@pytest.mark.parametrize("is_launched", [True, False])
def test_a_step_that_fails_does_not_take_the_one_before_with_it(is_launched, caplog):
    engine = Engine()
    engine.submit("a", range(10), greedy(max_tokens=20, ignore_eos=True))
    for _ in range(4):
        engine.step()
    num_tokens = len(engine.tokens("a"))
    setattr(engine.device, "lose_next" if is_launched else "refuse_next", RuntimeError("no"))
    engine.step()
    assert len(engine.tokens("a")) == num_tokens + 1
    engine.run()
    assert len(engine.tokens("a")) == num_tokens + 1
    assert engine.failed["a"].slug == "internal_error"
    assert "a step of 1 tokens failed, and with it a" in caplog.text


@pytest.mark.parametrize("name", ["lose_next", "refuse_next"])
def test_a_lost_device_ends_the_process_with_both_steps_on_the_board(name):
    engine = Engine(chunked_prefill_size=16)
    engine.submit("a", range(10), greedy(max_tokens=20, ignore_eos=True))
    engine.step()
    engine.submit("b", range(5, 15), greedy(max_tokens=20, ignore_eos=True))
    setattr(engine.device, name, DeviceLost("gone"))
    with pytest.raises(DeviceLost):
        for _ in range(2):
            engine.step()
    assert engine.board.step_request_ids == ["a", "b"]


def test_who_runs_alone_has_the_device_alone():
    engine = Engine()
    launch = engine.device.launch

    def watched(plan):
        assert not (alone := any(row.request.runs_alone for row in plan.rows)) or not engine.device._queue
        assert not alone or len(plan.rows) == 1
        return launch(plan)

    engine.device.launch = watched
    for index in range(6):
        engine.submit(f"r{index}", range(9), greedy(max_tokens=9, ignore_eos=True), runs_alone=index == 3)
        engine.step()
    engine.run()
    assert engine.device.num_overlapped > 0
    assert len({tuple(engine.tokens(f"r{index}")) for index in range(6)}) == 1
