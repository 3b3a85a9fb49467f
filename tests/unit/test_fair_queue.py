"""Slots and places shared between clients."""

import itertools

import numpy as np
import pytest

from engine.errors import Overloaded
from engine.scheduling.fair_queue import FairQueue
from engine.scheduling.request import Request
from engine.scheduling.waiting_queue import WaitingQueue
from helpers.scheduling import GREEDY, Harness, greedy, prompt

NO_IDS = np.empty(0, np.int32)


class Simulation:
    """A queue in front of some slots; every request runs for `length` turns."""

    def __init__(self, num_slots, length=4):
        self.queue = FairQueue(lambda: WaitingQueue("fcfs", lambda request: 0))
        self.num_slots, self.length = num_slots, length
        self.running = {}
        self.arrivals = itertools.count()
        self.admitted = []

    def push(self, client, weight=1.0, count=1):
        for _ in range(count):
            arrival = next(self.arrivals)
            request = Request("r", 0, GREEDY, 0, "", NO_IDS, NO_IDS, 0, 0, 0, arrival)
            request.client, request.weight = client, weight
            self.queue.push(request)

    def turn(self):
        for request in [r for r, left in self.running.items() if not left]:
            del self.running[request]
            self.queue.left(request)
        while len(self.running) < self.num_slots and self.queue.peek():
            request = self.queue.pop()
            self.running[request] = self.length + request.arrival % 3
            self.admitted.append(request.client)
        self.running = {request: left - 1 for request, left in self.running.items()}


@pytest.mark.parametrize("num_slots", [1, 2, 3, 8])
@pytest.mark.parametrize("weights", [(1, 1), (2, 1), (5, 1), (0.1, 0.2)])
def test_shares_follow_weights(num_slots, weights):
    """Where there are too few slots for that, nobody gets none."""
    sim = Simulation(num_slots)
    for client, weight in zip("ab", weights, strict=True):
        sim.push(client, weight, count=5000)
    slots = {"a": 0, "b": 0}
    for _ in range(900):
        sim.turn()
        for request in sim.running:
            slots[request.client] += 1
    share = slots["a"] / sum(slots.values())
    wanted = weights[0] / sum(weights)
    assert abs(share - wanted) <= max(0.03, 0.67 / num_slots if num_slots > 1 else 0)


def test_a_newcomer_has_the_next_slot_however_many_wait():
    sim = Simulation(4)
    sim.push("busy", count=200)
    for _ in range(10):
        sim.turn()
    before = len(sim.admitted)
    sim.push("new", count=2)
    for _ in range(10):
        sim.turn()
    assert sim.admitted[before : before + 2] == ["new", "new"]


def test_time_away_is_no_credit():
    sim = Simulation(1)
    sim.push("busy", count=400)
    for _ in range(300):
        sim.turn()
    before = len(sim.admitted)
    sim.push("new", count=20)
    for _ in range(60):
        sim.turn()
    after = sim.admitted[before : before + 10]
    assert after.count("new") == 5, "in turns, not all of the newcomer's first"


def test_many_clients_with_one_slot_take_turns():
    sim = Simulation(1)
    for client in "abcde":
        sim.push(client, count=3)
    for _ in range(100):
        sim.turn()
    assert all(set(sim.admitted[i : i + 5]) == set("abcde") for i in (0, 5, 10))
    assert not sim.queue._num_running and not sim.queue._weights, "nothing is kept of clients that are gone"


def test_a_full_queue_makes_room_for_who_has_less():
    h = Harness(max_running_requests=2, max_queued_requests=8)
    for i in range(10):
        h.submit(f"a{i}", prompt(20, seed=i), greedy(max_tokens=50), client="a")
        h.step()
    with pytest.raises(Overloaded):
        h.submit("a10", prompt(20), client="a")
    for i in range(5):
        h.submit(f"b{i}", prompt(20), client="b")
    assert h.displaced == ["a9", "a8", "a7", "a6", "a5"], "the newest"
    for n in (1, 4):
        with pytest.raises(Overloaded):
            h.submit("b5", prompt(20), n=n, client="b")
    h.submit("c", prompt(20), n=2, client="c")
    assert h.displaced[5:] == ["a4", "a3"]
    h.run()


def test_a_heavier_client_may_hold_more_places():
    h = Harness(max_running_requests=1, max_queued_requests=9)
    for i in range(10):
        h.submit(f"a{i}", prompt(20, seed=i), client="a", weight=4)
    for i in range(2):
        h.submit(f"b{i}", prompt(20), client="b")
    with pytest.raises(Overloaded):
        h.submit("b2", prompt(20), client="b")
    h.run()
