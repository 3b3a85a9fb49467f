"""A client with few requests beside one with many, in steps of the scheduler instead of time.

All running requests advance in every step, so a step takes as long for one client as for the other.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics

import pytest

from helpers.scheduling import Harness, greedy, prompt

NUM_CALM = 5


@dataclasses.dataclass
class Course:
    """Of one request: the steps in which it was submitted, first computed, and ended."""

    submitted: int
    started: int | None = None
    ended: int | None = None

    @property
    def wait(self) -> int:
        assert self.started is not None
        return self.started - self.submitted

    @property
    def latency(self) -> int:
        assert self.ended is not None
        return self.ended - self.submitted


class Simulation:
    def __init__(self, max_running: int) -> None:
        self._harness = Harness(num_blocks=4096, max_running_requests=max_running, max_queued_requests=512)
        self._step = 0
        self.courses: dict[str, Course] = {}

    def submit(self, client: str, number: int) -> None:
        name = f"{client}{number}"
        params = greedy(max_tokens=60 + 7 * (number % 9), ignore_eos=True)
        self._harness.submit(name, prompt(20 + number % 11, seed=number), params, client=client)
        self.courses[name] = Course(self._step)

    def step(self) -> None:
        self._step += 1
        plan = self._harness.step()
        assert plan is not None
        for row in plan.rows:
            course = self.courses[row.request.request_id]
            course.started = course.started or self._step
        for name, course in self.courses.items():
            if course.ended is None and self._harness.answers[name, 0].finish_reason is not None:
                course.ended = self._step

    def of(self, client: str) -> list[Course]:
        return [course for name, course in self.courses.items() if name.startswith(client)]

    def num_open(self, client: str) -> int:
        return sum(course.ended is None for course in self.of(client))


def beside(max_running: int, busy_at_once: int, *, in_turn: bool, head_start: int) -> Simulation:
    """200 requests of a busy client, so many at once, and `head_start` steps later five of a calm one. Who
    asks in turn needs a few steps to ask again: the slot that it had may be taken.
    """
    simulation = Simulation(max_running)
    busy, calm = iter(range(200)), iter(range(NUM_CALM))
    think_until = head_start
    for step in range(10_000):
        while simulation.num_open("busy") < busy_at_once and (number := next(busy, None)) is not None:
            simulation.submit("busy", number)
        if in_turn and simulation.num_open("calm"):
            think_until = step + 3
        elif step >= think_until:
            numbers = list(itertools.islice(calm, 1 if in_turn else NUM_CALM))
            for number in numbers:
                simulation.submit("calm", number)
            if not numbers and not simulation.num_open("calm"):
                assert simulation.num_open("busy") >= min(busy_at_once, max_running), "it was not busy"
                return simulation
        simulation.step()
    raise AssertionError("it does not end")


@pytest.mark.parametrize(
    ("max_running", "in_turn", "head_start"),
    [(8, True, 0), (8, True, 40), (8, False, 0), (8, False, 40), (4, True, 40)],
)
def test_a_calm_client_waits_no_longer_than_for_one_slot(
    max_running: int, in_turn: bool, head_start: int
) -> None:
    """At once as well, where the half of the slots that is its share is most of its requests."""
    crowded = beside(max_running, 200, in_turn=in_turn, head_start=head_start)
    roomy = beside(max_running, max_running - 1, in_turn=in_turn, head_start=head_start)
    one_run = statistics.median(c.ended - c.started for c in crowded.of("busy") if c.ended and c.started)
    assert statistics.median(course.wait for course in crowded.of("calm")) <= one_run
    latency = [statistics.median(c.latency for c in s.of("calm")) for s in (crowded, roomy)]
    assert latency[0] <= 1.5 * latency[1]
