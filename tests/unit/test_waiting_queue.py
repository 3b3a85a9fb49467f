"""Who is admitted next: priorities, and the bound that keeps them from starving others."""

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from engine.scheduling.fair_queue import FairQueue
from engine.scheduling.request import Request
from engine.scheduling.waiting_queue import MAX_PASSING, WaitingQueue
from helpers.scheduling import GREEDY, Harness, greedy, prompt

NO_IDS = np.empty(0, np.int32)


def make(arrival, priority=0):
    return Request("r", 0, GREEDY, 0, "", NO_IDS, NO_IDS, 0, 0, 0, arrival, priority)


def make_queue(policy="fcfs"):
    return WaitingQueue(policy, lambda request: 0)


def arrivals(queue):
    return [queue.pop().arrival for _ in range(len(queue))]


def test_higher_priorities_go_first_and_equals_by_arrival():
    queue = make_queue()
    for arrival, priority in enumerate([0, 5, -1, 5, 0, 2**31 - 1]):
        queue.push(make(arrival, priority))
    assert len(queue) == 6
    assert arrivals(queue) == [5, 1, 3, 0, 4, 2]


def test_lpm_compares_prefixes_within_a_priority():
    lengths = {0: 100, 1: 0, 2: 50}
    queue = WaitingQueue("lpm", lambda request: lengths[request.arrival])
    for arrival, priority in enumerate([0, 1, 1]):
        queue.push(make(arrival, priority))
    assert arrivals(queue) == [2, 1, 0]


@pytest.mark.parametrize("policy", ["fcfs", "lpm"])
def test_a_stream_of_higher_priorities_starves_nobody(policy):
    queue, clock = make_queue(policy), itertools.count(3)
    for arrival in range(3):
        queue.push(make(arrival, -arrival))
    admitted = []
    while len(admitted) < 4 * (MAX_PASSING + 1):
        queue.push(make(next(clock), priority=9))
        admitted.append(queue.pop().arrival)
    places = [admitted.index(arrival) for arrival in range(3)]
    assert places == [MAX_PASSING, 2 * MAX_PASSING + 1, 3 * MAX_PASSING + 2], "one in MAX_PASSING + 1 each"


def test_preempted_ones_go_before_any_priority():
    queue = FairQueue(make_queue)
    queue.push(make(1, priority=100))
    queue.push_preempted(make(0, priority=-100))
    assert arrivals(queue) == [0, 1]


def test_a_turn_given_is_kept_when_a_higher_priority_arrives():
    queue = make_queue()
    queue.push(make(0))
    assert queue.peek().arrival == 0
    queue.push(make(1, priority=1))
    assert arrivals(queue) == [0, 1]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("push"), st.integers(-1, 1)),
            st.tuples(st.just("remove"), st.integers(0, 20)),
            st.tuples(st.just("pop"), st.just(0)),
        ),
        max_size=150,
    )
)
def test_the_queue_is_a_sorted_list_with_a_share_for_the_oldest(operations):
    queue, waiting, clock, num_passing = make_queue(), [], itertools.count(), 0
    for operation, value in operations:
        if operation == "push":
            waiting.append(make(next(clock), value))
            queue.push(waiting[-1])
        elif operation == "remove" and waiting:
            queue.remove(waiting.pop(value % len(waiting)))
        elif operation == "pop" and waiting:
            expected = waiting[0]
            if num_passing < MAX_PASSING:
                expected = min(waiting, key=lambda r: (-r.priority, r.arrival))
            num_passing = 0 if expected is waiting[0] else num_passing + 1
            assert queue.pop() is expected
            waiting.remove(expected)
        assert len(queue) == len(waiting)
        assert sorted(r.arrival for r in queue) == [r.arrival for r in waiting]


def test_the_scheduler_admits_by_priority():
    h = Harness(max_running_requests=1)
    h.submit("first", prompt(20), greedy(max_tokens=2))
    h.step()
    for name, priority in (("low", -1), ("plain", 0), ("high", 7)):
        h.submit(name, prompt(20, seed=priority + 2), greedy(max_tokens=2), n=2, priority=priority)
    h.run()
    order = list(dict.fromkeys(rows[0][0] for rows in h.runner.plans))
    assert order == ["first", "high", "plain", "low"]
