"""Which request gets a place for its adapter, when; with a pool that is played by the test."""

from __future__ import annotations

from engine.core.messages import AdapterRef
from engine.scheduling.adapter_queue import MAX_PASSING, AdapterLine, AdapterQueue
from helpers.scheduling import AdapterSlots


class Ask:
    """What the queue sees of a request; compared by identity."""

    def __init__(self, digest: str) -> None:
        self.adapter_ref = AdapterRef("", digest)
        self.adapter = None


def push(queue: AdapterLine, digest: str) -> Ask:
    request = Ask(digest)
    queue.push(request)
    return request


def test_as_many_different_adapters_as_there_are_places():
    queue = AdapterQueue(AdapterSlots(2)).line()
    a, b, c, again = (push(queue, name) for name in "abca")
    assert queue.take_ready() == [a, b, again]
    assert queue.take_ready() == [] and len(queue) == 1
    queue.release(a)
    assert queue.take_ready() == [], "its adapter still has a user"
    queue.release(again)
    assert queue.take_ready() == [c]
    assert not queue


def test_what_is_read_holds_its_place_and_nobody_else_up():
    slots = AdapterSlots(2)
    slots.slow = {"a"}
    queue = AdapterQueue(slots).line()
    a, b = push(queue, "a"), push(queue, "b")
    assert queue.take_ready() == [b] and a in queue
    slots.slow.clear()
    assert queue.take_ready() == [a] and a not in queue


def test_a_request_that_cannot_have_its_adapter_comes_out_too():
    slots = AdapterSlots(1)
    slots.broken = {"a": ValueError("broken")}
    queue = AdapterQueue(slots).line()
    a = push(queue, "a")
    assert queue.take_ready() == [a] and a.adapter.error is slots.broken["a"]


def test_cancelled_requests_leave_nothing_behind():
    slots = AdapterSlots(1)
    slots.slow = {"a"}
    queue = AdapterQueue(slots).line()
    a, b = push(queue, "a"), push(queue, "b")
    queue.take_ready()
    queue.release(b)
    queue.release(a)
    assert not queue and slots.num_in_use == 0
    queue.release(a)
    assert slots.num_in_use == 0


def test_a_steady_stream_of_other_adapters_is_held_up_for_one_that_has_no_place():
    slots = AdapterSlots(1)
    queue = AdapterQueue(slots).line()
    running = [push(queue, "popular")]
    assert queue.take_ready() == running
    waiting = push(queue, "rare")
    num_passing = 0
    while True:
        push(queue, "popular")
        ready = queue.take_ready()
        if not ready:
            break
        num_passing += len(ready)
        running += ready
        queue.release(running.pop(0))
    assert num_passing == MAX_PASSING
    for request in running:
        queue.release(request)
    assert queue.take_ready() == [waiting]
    assert len(queue) == 1, "the one that came when the stream was held up"
    queue.release(waiting)
    assert len(queue.take_ready()) == 1


def test_two_lines_share_places_and_turns():
    """What one kind of request takes, the other cannot have; the oldest of both is not passed for ever."""
    slots = AdapterSlots(1)
    queue = AdapterQueue(slots)
    texts, prompts = queue.line(), queue.line()
    running = [push(texts, "popular")]
    assert prompts.take_ready() == [] and len(prompts) == 0 and len(texts) == 1
    assert texts.take_ready() == running, "it was ready before they asked"
    rare = push(prompts, "rare")
    num_passing = 0
    while True:
        push(texts, "popular")
        ready = texts.take_ready()
        if not ready:
            break
        num_passing += len(ready)
        running += ready
        texts.release(running.pop(0))
    assert num_passing == MAX_PASSING
    for request in running:
        texts.release(request)
    assert texts.take_ready() == [] and prompts.take_ready() == [rare]
    prompts.release(rare)
    assert len(texts.take_ready()) == 1 and slots.num_in_use == 1


def test_what_is_ready_can_be_released_before_it_is_taken():
    slots = AdapterSlots(1)
    queue = AdapterQueue(slots)
    texts, prompts = queue.line(), queue.line()
    a, b = push(texts, "a"), push(prompts, "b")
    assert prompts.take_ready() == []
    texts.release(a)
    assert texts.take_ready() == [] and len(texts) == 0
    assert prompts.take_ready() == [b]
    prompts.release(b)
    assert slots.num_in_use == 0
