"""The scheduler when places or blocks run out: preemption, admission, cancels, queue order."""

import numpy as np
import pytest

from engine.errors import InvalidRequest, Overloaded
from engine.sampling.params import SamplingParams
from engine.scheduling.fair_queue import FairQueue
from engine.scheduling.request import Request
from engine.scheduling.waiting_queue import MAX_PASSING, WINDOW, WaitingQueue
from helpers.scheduling import GREEDY, Harness, answer_alone, greedy, prompt

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

    queue = FairQueue(lambda: WaitingQueue(policy, lambda request: request.arrival))
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
        assert served < 4 * (MAX_PASSING + WINDOW), "starved"
    assert served > 10, "the policy did nothing"


def test_the_queue_is_bounded_in_tokens():
    h = Harness(max_running_requests=1, max_queued_tokens=100)
    h.submit("long", prompt(500), greedy(max_tokens=5))  # runs: its tokens do not wait
    h.step()
    h.submit("a", prompt(60), greedy(max_tokens=5), n=3)  # one prompt, however many choices
    with pytest.raises(Overloaded, match="too many tokens"):
        h.submit("b", prompt(41), greedy(max_tokens=5))
    h.submit("c", prompt(40), greedy(max_tokens=5))
    h.run()
    h.submit("b", prompt(200), greedy(max_tokens=5))  # nobody waits when a slot is free
    h.run()
