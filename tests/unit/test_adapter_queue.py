"""Which request gets a place for its adapter, when; with a pool that is played by the test."""

from __future__ import annotations

from types import SimpleNamespace

from engine.core.messages import AdapterRef
from engine.scheduling.adapter_queue import MAX_PASSING, AdapterQueue


class Slots:
    """`count` places; an adapter is read as soon as it has one, unless it is in `slow` or `broken`."""

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


class Ask:
    """What the queue sees of a request; compared by identity."""

    def __init__(self, digest: str) -> None:
        self.adapter_ref = AdapterRef("", digest)
        self.adapter = None


def push(queue: AdapterQueue, digest: str) -> Ask:
    request = Ask(digest)
    queue.push(request)
    return request


def test_as_many_different_adapters_as_there_are_places():
    queue = AdapterQueue(Slots(2))
    a, b, c, again = (push(queue, name) for name in "abca")
    assert queue.take_ready() == [a, b, again]
    assert queue.take_ready() == [] and len(queue) == 1
    queue.release(a)
    assert queue.take_ready() == [], "its adapter still has a user"
    queue.release(again)
    assert queue.take_ready() == [c]
    assert not queue


def test_what_is_read_holds_its_place_and_nobody_else_up():
    slots = Slots(2)
    slots.slow = {"a"}
    queue = AdapterQueue(slots)
    a, b = push(queue, "a"), push(queue, "b")
    assert queue.take_ready() == [b] and a in queue
    slots.slow.clear()
    assert queue.take_ready() == [a] and a not in queue


def test_a_request_that_cannot_have_its_adapter_comes_out_too():
    slots = Slots(1)
    slots.broken = {"a": ValueError("broken")}
    queue = AdapterQueue(slots)
    a = push(queue, "a")
    assert queue.take_ready() == [a] and a.adapter.error is slots.broken["a"]


def test_cancelled_requests_leave_nothing_behind():
    slots = Slots(1)
    slots.slow = {"a"}
    queue = AdapterQueue(slots)
    a, b = push(queue, "a"), push(queue, "b")
    queue.take_ready()
    queue.release(b)
    queue.release(a)
    assert not queue and slots.num_in_use == 0
    queue.release(a)
    assert slots.num_in_use == 0


def test_a_steady_stream_of_other_adapters_is_held_up_for_one_that_has_no_place():
    slots = Slots(1)
    queue = AdapterQueue(slots)
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
