import time

import numpy as np
import pytest

from engine.errors import InvalidRequest, Overloaded
from engine.sampling.params import SamplingParams
from engine.scheduling import block_claims
from engine.scheduling.request import Request
from engine.scheduling.step_plan import StepResult
from engine.scheduling.step_time import StepTimeModel
from engine.scheduling.waiting_queue import MAX_PASSED_OVER, WINDOW, WaitingQueue
from helpers.scheduling import GREEDY, Harness, answer_alone


def prompt(length, seed=0, vocab_size=50):
    return np.random.default_rng(seed).integers(0, vocab_size, length).tolist()


def greedy(**fields):
    return SamplingParams(temperature=0, **fields)


# --- one request


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 33, 511, 512, 513, 1300])
@pytest.mark.parametrize("chunk", [1, 16, 100, 512])
def test_answer_does_not_depend_on_chunks(length, chunk):
    if chunk == 1 and length > 100:
        chunk = 7
    h = Harness(chunked_prefill_size=chunk)
    h.submit("a", prompt(length), greedy(max_tokens=20))
    h.run()
    expected = answer_alone(prompt(length), greedy(max_tokens=20), chunked_prefill_size=4096)
    assert h.answers["a", 0] == expected
    assert len(expected.token_ids) == 20
    assert expected.finish_reason == "length"
    assert all(sum(row[3] for row in rows) <= max(chunk, 16) for rows in h.runner.plans)


def test_fake_runner_sees_a_wrong_block_table():
    def run(corrupt):
        h = Harness()
        h.submit("a", prompt(40), greedy(max_tokens=4))
        h.step()
        if corrupt:
            request = next(iter(h.scheduler._running))
            table = request.block_table
            table[0], table[1] = table[1], table[0]
        h.step()
        return h.tokens("a")

    assert run(corrupt=False) != run(corrupt=True)


def test_stops_at_eos_and_at_stop_tokens():
    free = answer_alone(prompt(20), greedy(max_tokens=50)).token_ids
    eos = free[10]
    first = free.index(eos)
    h = Harness(eos_token_ids=(eos,))
    h.submit("eos", prompt(20), greedy(max_tokens=50))
    h.submit("ignored", prompt(20), greedy(max_tokens=50, ignore_eos=True))
    h.submit("stop", prompt(20), greedy(max_tokens=50, ignore_eos=True, stop_token_ids=(free[3], eos)))
    h.run()
    assert h.tokens("eos") == free[: first + 1]
    assert (h.answers["eos", 0].finish_reason, h.answers["eos", 0].stop_token_id) == ("stop", eos)
    assert h.tokens("ignored") == free
    assert h.answers["ignored", 0].finish_reason == "length"
    assert h.answers["stop", 0].stop_token_id in (free[3], eos)
    assert len(h.tokens("stop")) == min(free.index(free[3]), first) + 1


def test_min_tokens_bans_the_stop_tokens_until_it_is_reached():
    free = answer_alone(prompt(20), greedy(max_tokens=50)).token_ids
    eos = free[4]
    params = greedy(max_tokens=50, min_tokens=30)
    h = Harness(eos_token_ids=(eos,))
    h.submit("a", prompt(20), params)
    h.run()
    assert len(h.tokens("a")) > 30 or h.answers["a", 0].finish_reason == "length"
    assert eos not in h.tokens("a")[:30]


def test_a_stop_token_below_min_tokens_ends_nothing():
    """Should the sampler have had no other choice."""
    h = Harness(eos_token_ids=(5,))
    h.submit("a", prompt(20), greedy(max_tokens=10, min_tokens=3))
    reasons = []
    for _ in range(4):
        plan = h.scheduler.schedule()
        assert (plan.rows[0].request.banned_ids is None) == (len(reasons) == 3)
        reasons += [new.finish_reason for new in h.scheduler.update(plan, StepResult(np.array([5])))]
    assert reasons == [None, None, None, "stop"]


def test_max_tokens_zero_needs_no_step():
    h = Harness(max_running_requests=1, max_queued_requests=0)
    h.submit("zero", prompt(20), greedy(max_tokens=0), n=1)
    assert not h.scheduler.has_work
    assert h.scheduler.schedule() is None


def test_context_length_ends_an_open_answer():
    h = Harness(context_length=64)
    h.submit("a", prompt(40), greedy(max_tokens=None))
    h.run()
    assert len(h.tokens("a")) == 24
    assert h.answers["a", 0].finish_reason == "length"


# --- sharing


def test_second_identical_request_computes_only_its_tail():
    h = Harness()
    h.submit("a", prompt(500), greedy(max_tokens=4))
    h.run()
    before = h.scheduler.counters.prompt_tokens_computed
    h.submit("b", prompt(500), greedy(max_tokens=4))
    h.run()
    assert h.scheduler.counters.prompt_tokens_computed - before == 4
    assert h.scheduler.counters.prompt_tokens_cached == 496
    assert h.tokens("a") == h.tokens("b") == answer_alone(prompt(500), greedy(max_tokens=4)).token_ids


def test_two_identical_requests_at_once_compute_the_prompt_once():
    h = Harness()
    for name in "ab":
        h.submit(name, prompt(500), greedy(max_tokens=4))
    h.run()
    assert h.scheduler.counters.prompt_tokens_computed <= 520
    assert h.scheduler.counters.prompt_tokens_cached == 496
    assert h.tokens("a") == h.tokens("b")


@pytest.mark.parametrize("chunk", [16, 100, 512, 8192])
def test_common_prefix_of_eight_is_computed_once(chunk):
    h = Harness(chunked_prefill_size=chunk, num_blocks=512)
    for i in range(8):
        h.submit(f"r{i}", prompt(1024) + prompt(32, seed=i + 1), greedy(max_tokens=8))
    h.run()
    assert h.scheduler.counters.prompt_tokens_computed <= 1024 + 8 * (32 + 16)
    for i in range(8):
        alone = answer_alone(prompt(1024) + prompt(32, seed=i + 1), greedy(max_tokens=8))
        assert h.answers[f"r{i}", 0] == alone


def test_choices_share_one_prompt_and_differ():
    h = Harness()
    params = SamplingParams(temperature=1, seed=3, max_tokens=12)
    h.submit("a", prompt(500), params, n=6)
    h.run()
    assert h.scheduler.counters.prompt_tokens_computed <= 500 + 5 * 16
    answers = [h.tokens("a", choice) for choice in range(6)]
    assert len({tuple(tokens) for tokens in answers}) == 6
    assert answers == [answer_alone(prompt(500), params, choice).token_ids for choice in range(6)]


def test_a_prefix_that_starts_later_is_taken_from_the_running_one():
    h = Harness(chunked_prefill_size=64)
    h.submit("a", prompt(640), greedy(max_tokens=4))
    for _ in range(3):
        h.step()
    h.submit("b", prompt(640), greedy(max_tokens=4))
    h.run()
    assert h.scheduler.counters.prompt_tokens_computed <= 640 + 16


def test_output_tokens_are_cached_for_the_next_turn():
    h = Harness()
    h.submit("a", prompt(32), greedy(max_tokens=33))
    h.run()
    turn = prompt(32) + h.tokens("a") + prompt(5, seed=9)
    h.submit("b", turn, greedy(max_tokens=4))
    h.run()
    assert h.scheduler.counters.prompt_tokens_cached == 64
    assert h.answers["b", 0] == answer_alone(turn, greedy(max_tokens=4))


def test_namespaces_never_meet():
    h = Harness()
    h.submit("a", prompt(200), greedy(max_tokens=2), namespace="one")
    h.submit("b", prompt(200), greedy(max_tokens=2), namespace="two")
    h.run()
    h.submit("c", prompt(200), greedy(max_tokens=2))
    h.run()
    assert h.scheduler.counters.prompt_tokens_cached == 0
    assert h.scheduler.counters.prompt_tokens_computed == 600


def test_without_the_cache_nothing_is_shared_or_waited_for():
    h = Harness(enabled=False)
    h.submit("a", prompt(100), greedy(max_tokens=2))
    h.submit("b", prompt(100), greedy(max_tokens=2))
    plan = h.step()
    assert [row.num_tokens for row in plan.rows] == [100, 100]
    h.run()
    assert h.cache.num_cached == 0
    assert h.scheduler.counters.prompt_tokens_cached == 0


@pytest.mark.parametrize("how", ["cancel", "fail"])
def test_waiting_for_a_block_ends_with_its_owner(how):
    h = Harness(chunked_prefill_size=64)
    h.submit("owner", prompt(320), greedy(max_tokens=2))
    h.submit("waits", prompt(320), greedy(max_tokens=2))
    plan = h.step()
    assert [row.request.request_id for row in plan.rows] == ["owner"]
    if how == "cancel":
        h.scheduler.cancel("owner")
    else:
        plan = h.scheduler.schedule()
        assert h.scheduler.abandon(plan) == ["owner"]
    h.run()
    assert h.answers["waits", 0] == answer_alone(prompt(320), greedy(max_tokens=2))
    assert h.runner.tokens_computed["waits"] == 320 - 64 + 1


def test_colliding_hashes_are_no_common_prefix(monkeypatch):
    monkeypatch.setattr(block_claims, "hash", lambda value: 7, raising=False)
    h = Harness()
    seeds = {"first": 0, "same": 0, "other": 1, "elsewhere": 0}
    for name, seed in seeds.items():
        namespace = "two" if name == "elsewhere" else "one"
        h.submit(name, prompt(100, seed), greedy(max_tokens=4), namespace=namespace)
    plan = h.step()
    assert [row.request.request_id for row in plan.rows] == ["first", "other", "elsewhere"]
    h.run()
    for name, seed in seeds.items():
        assert h.answers[name, 0] == answer_alone(prompt(100, seed), greedy(max_tokens=4))


# --- the budget


def test_decodes_are_in_every_step():
    h = Harness(chunked_prefill_size=32)
    for i in range(4):
        h.submit(f"d{i}", prompt(8, seed=i), greedy(max_tokens=200))
    for _ in range(3):
        h.step()
    h.submit("long", prompt(600, seed=9), greedy(max_tokens=2))
    for _ in range(10):
        plan = h.step()
        by_id = {row.request.request_id: row.num_tokens for row in plan.rows}
        assert all(by_id[f"d{i}"] == 1 for i in range(4))
        assert plan.num_tokens <= 32
    h.run()


def take_time(h, seconds):
    """Have steps last as long as `seconds` says of their plan."""
    execute = h.runner.execute

    def timed(plan):
        h.now += seconds(plan)
        return execute(plan)

    h.runner.execute = timed


def test_prefill_beside_decodes_keeps_to_the_time_target():
    h = Harness(chunked_prefill_size=512, target_itl_s=0.5, num_blocks=1024)
    seconds = lambda plan: 0.02 + 0.004 * sum(r.num_tokens for r in plan.rows if r.num_tokens > 1)  # noqa: E731
    take_time(h, seconds)
    h.submit("decodes", prompt(100), greedy(max_tokens=300))
    for _ in range(20):
        h.step()
    h.submit("long", prompt(8000, seed=1), greedy(max_tokens=2))
    sizes = []
    while not h.tokens("long"):
        plan = h.step()
        assert any(row.request.request_id == "decodes" for row in plan.rows)
        assert seconds(plan) <= 0.5
        sizes.append(plan.num_tokens - 1)
    assert max(sizes) >= 96  # (0.5 - 0.02) / 0.004 = 120, in whole blocks


def test_an_impossible_target_still_makes_progress():
    h = Harness(target_itl_s=1e-9)
    take_time(h, lambda plan: 1.0)
    h.submit("decodes", prompt(10), greedy(max_tokens=200))
    h.step()
    h.submit("long", prompt(300, seed=1), greedy(max_tokens=2))
    while not h.answers["long", 0].finish_reason:
        h.step()
    assert not h.answers["decodes", 0].finish_reason, "it had to wait for the other one's end"
    h.run()


def test_prefill_alone_is_not_held_back_by_the_time_target():
    h = Harness(target_itl_s=1e-9, chunked_prefill_size=64)
    take_time(h, lambda plan: 1.0)
    for i in range(3):
        h.submit(f"r{i}", prompt(100, seed=i), greedy(max_tokens=1))
        assert h.step().num_tokens == 64
        h.run()


def test_step_time_model_learns_a_line_and_forgets_a_stall():
    model = StepTimeModel()
    assert model.prefill_tokens_within(0.1, most=512) == 512
    for _ in range(50):
        model.observe(0, 0.010)
        model.observe(100, 0.010 + 0.1)
    assert model.prefill_tokens_within(0.110, most=512) == pytest.approx(100, abs=1)
    assert model.prefill_tokens_within(0.010, most=512) == 0
    model.observe(0, 5.0)
    model.observe(100, 60.0)
    for _ in range(120):
        model.observe(0, 0.010)
        model.observe(100, 0.110)
    assert model.prefill_tokens_within(0.110, most=512) == pytest.approx(100, abs=5)


# --- preemption


def test_preemption_keeps_every_answer():
    h = Harness(num_blocks=12, context_length=12 * 16, max_running_requests=8)
    wanted = {f"r{i}": prompt(20, seed=i) for i in range(6)}
    for name, ids in wanted.items():
        h.submit(name, ids, SamplingParams(seed=5, max_tokens=60))
    h.run()
    assert h.scheduler.counters.num_preemptions > 0
    for name, ids in wanted.items():
        assert h.answers[name, 0] == answer_alone(ids, SamplingParams(seed=5, max_tokens=60))


def test_the_youngest_is_preempted_and_comes_back_before_the_others():
    h = Harness(num_blocks=8, context_length=128, max_running_requests=2)
    for i, name in enumerate(["old", "young", "waiting"]):
        h.submit(name, prompt(30, seed=i), greedy(max_tokens=80))
    finished = []
    while h.scheduler.has_work:
        h.step()
        finished += [k[0] for k, a in h.answers.items() if a.finish_reason and k[0] not in finished]
        assert {r.request_id for r in h.scheduler._running if r.num_preemptions} <= {"young"}
    assert h.scheduler.counters.num_preemptions == 1
    assert finished == ["old", "young", "waiting"]
    assert all(len(h.tokens(name)) == 80 for name in finished)


def test_a_prefill_may_preempt_a_younger_one_that_is_planned_already():
    """The youngest leaves the plan in which it already has a row, and stays out of that step."""
    h = Harness(num_blocks=10, context_length=160, chunked_prefill_size=20)
    wanted = {"old": (prompt(150), 2), "young": (prompt(2, seed=1), 60)}
    for name, (ids, max_tokens) in wanted.items():
        h.submit(name, ids, greedy(max_tokens=max_tokens))
    for _ in wanted:  # admitted although there is not room for both
        h.scheduler._running[h.scheduler._waiting.pop()] = None
    h.run()
    assert h.scheduler.counters.num_preemptions == 1
    assert len(h.tokens("young")) > 2
    for name, (ids, max_tokens) in wanted.items():
        assert h.answers[name, 0] == answer_alone(ids, greedy(max_tokens=max_tokens))


def test_a_request_as_large_as_the_pool_runs():
    h = Harness(num_blocks=4, context_length=1000)
    h.submit("whole", prompt(50), greedy(max_tokens=14))
    h.submit("other", prompt(50, seed=1), greedy(max_tokens=14))
    h.run()
    assert len(h.tokens("whole")) == len(h.tokens("other")) == 14


# --- admission


@pytest.mark.parametrize(
    ("ids", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1] * 65, {}, "the prompt has 65 tokens, but the context length is 64"),
        ([1] * 64, {"max_tokens": None}, "the prompt has 64 tokens, but the context length is 64"),
        (
            [1] * 60,
            {"max_tokens": 5},
            "the prompt has 60 tokens and max_tokens is 5, together 65, but the context length is 64",
        ),
        ([1, 50], {}, "prompt has the token id 50, but the vocabulary has ids 0 to 49"),
        ([-1, 2], {}, "prompt has the token id -1, but the vocabulary has ids 0 to 49"),
        ([1], {"stop_token_ids": (99,)}, "stop_token_ids has the token id 99"),
        ([1], {"logit_bias": {77: 1.0}}, "logit_bias has the token id 77"),
        ([1] * 60, {"max_tokens": None, "min_tokens": 5}, "min_tokens is 5, but at most 4 tokens"),
    ],
)
def test_impossible_requests_are_refused_with_the_numbers(ids, params, message):
    h = Harness(context_length=64)
    with pytest.raises(InvalidRequest, match=f"^Invalid request: {message}") as caught:
        h.submit("a", ids, greedy(**params))
    too_long = "context length" in message
    assert caught.value.slug == ("context_length_exceeded" if too_long else "invalid_value")
    assert not h.scheduler.has_work


def test_a_prompt_longer_than_the_pool_is_refused():
    h = Harness(num_blocks=4, context_length=1000)
    with pytest.raises(InvalidRequest, match="has 65 tokens, but the context length is 64"):
        h.submit("a", prompt(65), greedy(max_tokens=1))


def test_limits_count_choices_and_never_wait_with_zero():
    h = Harness(max_running_requests=4, max_queued_requests=0)
    h.submit("a", prompt(10), n=3)
    with pytest.raises(Overloaded) as caught:
        h.submit("b", prompt(10), n=2)
    assert caught.value.slug == "queue_full"
    h.submit("b", prompt(10), n=1)
    with pytest.raises(InvalidRequest, match="n is 5, but at most 4"):
        h.submit("c", prompt(10), n=5)
    h.run()
    h.submit("d", prompt(10), n=4)
    h.run()


def test_a_queue_of_two_takes_two_more_than_run():
    h = Harness(max_running_requests=1, max_queued_requests=2)
    for name in "abc":
        h.submit(name, prompt(10))
    with pytest.raises(Overloaded):
        h.submit("d", prompt(10))
    h.step()
    assert (h.scheduler.num_running, h.scheduler.num_waiting) == (1, 2)
    h.run()
    assert all(h.answers[name, 0].finish_reason for name in "abc")


def test_a_live_id_cannot_be_used_twice():
    h = Harness()
    h.submit("a", prompt(10))
    with pytest.raises(InvalidRequest, match="in use"):
        h.submit("a", prompt(10))


# --- cancel


@pytest.mark.parametrize("when", ["waiting", "prefill", "waiting for a block", "decode"])
def test_cancel_frees_everything_at_any_moment(when):
    h = Harness(chunked_prefill_size=64, max_running_requests=2)
    h.submit("first", prompt(200), greedy(max_tokens=30))
    h.submit("victim", prompt(200), greedy(max_tokens=30))
    h.submit("third", prompt(100, seed=2), greedy(max_tokens=30))
    steps = {"waiting": 0, "waiting for a block": 1, "prefill": 1, "decode": 12}[when]
    victim = "first" if when == "prefill" else "victim"
    for _ in range(steps):
        h.step()
    h.scheduler.cancel(victim)
    h.scheduler.check()
    got = len(h.tokens(victim))
    h.run()
    assert len(h.tokens(victim)) == got < 30
    others = {"first", "victim", "third"} - {victim}
    assert all(len(h.tokens(name)) == 30 for name in others)


def test_cancel_choice_leaves_the_others():
    h = Harness()
    h.submit("a", prompt(40), SamplingParams(seed=1, max_tokens=20), n=3)
    for _ in range(5):
        h.step()
    h.scheduler.cancel_choice("a", 1)
    h.scheduler.cancel_choice("a", 1)
    h.scheduler.cancel_choice("a", 99)
    h.scheduler.cancel_choice("nobody", 0)
    h.run()
    assert [len(h.tokens("a", choice)) for choice in (0, 2)] == [20, 20]
    assert len(h.tokens("a", 1)) < 20


def test_flush_drops_what_nobody_holds():
    h = Harness()
    h.submit("a", prompt(100), greedy(max_tokens=2))
    h.run()
    h.submit("b", prompt(100, seed=1), greedy(max_tokens=50))
    h.step()
    h.scheduler.flush_cache()
    h.scheduler.check()
    assert h.cache.num_cached == 0
    h.run()
    assert h.answers["b", 0] == answer_alone(prompt(100, seed=1), greedy(max_tokens=50))


# --- policies


@pytest.mark.parametrize("policy", ["fcfs", "lpm"])
def test_preempted_requests_come_first_and_the_oldest_of_them(policy):
    def make(arrival):
        empty = np.empty(0, np.int32)
        return Request("r", 0, GREEDY, 0, "", empty, empty, 0, 0, 0, arrival)

    queue = WaitingQueue(policy, lambda request: request.arrival)
    fresh, preempted = [make(i) for i in (5, 6, 7)], [make(i) for i in (3, 1, 2)]
    for request in fresh:
        queue.push(request)
    assert queue.peek() is fresh[0 if policy == "fcfs" else 2]
    for request in preempted:
        queue.push_preempted(request)
    assert len(queue) == 6
    assert [queue.pop().arrival for _ in range(3)] == [1, 2, 3]
    queue.remove(fresh[2])
    assert [queue.pop().arrival for _ in range(2)] == ([5, 6] if policy == "fcfs" else [6, 5])
    with pytest.raises(IndexError):
        queue.pop()


def test_lpm_admits_the_longest_cached_prefix_first():
    h = Harness(schedule_policy="lpm", max_running_requests=1)
    h.submit("seed", prompt(160), greedy(max_tokens=2))
    h.step()
    h.submit("none", prompt(100, seed=5), greedy(max_tokens=2))
    h.submit("half", prompt(160)[:80] + prompt(80, seed=6), greedy(max_tokens=2))
    h.submit("full", prompt(160), greedy(max_tokens=2))
    h.run()
    order = list(dict.fromkeys(rows[0][0] for rows in h.runner.plans))
    assert order == ["seed", "full", "half", "none"]


def test_fcfs_admits_in_order():
    h = Harness(max_running_requests=1)
    for i in range(5):
        h.submit(f"r{i}", prompt(20 + i), greedy(max_tokens=2))
    h.run()
    assert list(dict.fromkeys(rows[0][0] for rows in h.runner.plans)) == [f"r{i}" for i in range(5)]


def test_a_turn_is_kept_until_it_is_used():
    """Who waits for blocks is not overtaken by one that comes later with a longer prefix."""
    first, second, late = (
        Harness().scheduler.submit("r", np.array(prompt(5), np.int32), greedy(), seed=0)[0] for _ in range(3)
    )
    lengths = {first: 1, second: 2, late: 3}
    queue = WaitingQueue("lpm", lengths.__getitem__)
    for request in (first, second):
        queue.push(request)
    assert queue.peek() is second
    queue.push(late)
    assert queue.peek() is second
    queue.remove(second)
    assert queue.peek() is late


def test_lpm_lets_nobody_starve():
    h = Harness(schedule_policy="lpm", max_running_requests=1)
    h.submit("seed", prompt(160), greedy(max_tokens=1))
    h.run()
    h.submit("poor", prompt(100, seed=5), greedy(max_tokens=1))
    served = 0
    while not h.tokens("poor"):
        while h.scheduler.num_waiting < 5:
            h.submit(f"rich{served}-{h.scheduler.num_waiting}", prompt(160), greedy(max_tokens=1))
        h.step()
        served += 1
        assert served < 4 * (MAX_PASSED_OVER + WINDOW), "starved"
    assert served > 10, "the policy did nothing"


# --- cost


def test_a_decode_step_of_sixteen_is_cheap():
    """Guards against accidental quadratic work; the figure itself belongs to the bench."""

    h = Harness(num_blocks=200, debug_checks=False)
    for i in range(16):
        h.submit(f"r{i}", prompt(10, seed=i), greedy(max_tokens=120))
    while any(not h.tokens(f"r{i}") for i in range(16)):
        h.step()
    result = StepResult(np.zeros(16, np.int32))
    times = []
    for _ in range(60):
        begin = time.perf_counter()
        plan = h.scheduler.schedule()
        h.scheduler.update(plan, result)
        times.append(time.perf_counter() - begin)
    assert sorted(times)[len(times) // 2] < 1e-3


def test_cached_tokens_are_those_of_the_first_start():
    """Neither losing the slot before it, nor starting again, changes what is reported."""
    h = Harness(chunked_prefill_size=64)
    h.submit("owner", prompt(320), greedy(max_tokens=2))
    h.submit("waits", prompt(320), greedy(max_tokens=3))
    h.step()
    waits = next(r for r in h.scheduler._running if r.request_id == "waits")
    h.scheduler._preempt(waits)
    assert waits.num_cached is None
    while not h.tokens("waits"):
        h.step()
    assert waits.num_cached == 304
    h.scheduler._preempt(waits)
    h.run()
    assert waits.num_cached == 304
