"""Which adapters are in memory; what is read is played by the test."""

from __future__ import annotations

import dataclasses
import threading
import time

import pytest

from engine.adapters.adapter_pool import AdapterPool
from engine.core.messages import AdapterRef
from engine.errors import InvalidRequest, NotFound


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What a load gives; an adapter's digest is its directory, unless the test says otherwise."""

    digest: str
    weights: object
    rank: int = 4
    num_bytes: int = 100


class Disk:
    """Adapters to be read. While `gate` is not set, reading waits."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.reads: list[str] = []
        self.digests: dict[str, str] = {}
        self.errors: dict[str, Exception] = {}

    def load(self, directory: str) -> Loaded:
        assert self.gate.wait(10)
        self.reads.append(directory)
        if directory in self.errors:
            raise self.errors[directory]
        return Loaded(self.digests.get(directory, directory), object())


@pytest.fixture
def disk():
    return Disk()


@pytest.fixture
def make_pool(disk):
    pools = []

    def make(max_loaded: int, max_in_use: int) -> AdapterPool:
        pools.append(AdapterPool(disk.load, max_loaded=max_loaded, max_in_use=max_in_use))
        return pools[-1]

    yield make
    disk.gate.set()
    for pool in pools:
        pool.close()


def ref(name: str, **fields) -> AdapterRef:
    return AdapterRef(name, name, **fields)


def settled(pool: AdapterPool) -> None:
    deadline = time.monotonic() + 10
    while pool.is_loading:
        pool.wait(1)
        pool.settle()
        assert time.monotonic() < deadline


def used(pool: AdapterPool, name: str, **fields) -> None:
    """Take an adapter until it is there, and give it back."""
    place = pool.try_take(ref(name, **fields))
    assert place is not None
    settled(pool)
    assert place.weights is not None
    pool.give_back(place)
    pool.check()


def test_the_least_recently_used_makes_room(make_pool, disk):
    pool = make_pool(3, 3)
    for name in "abcad":
        used(pool, name)
    assert disk.reads == ["a", "b", "c", "d"]
    assert pool.num_loaded == 3 and pool.num_evictions == 1
    used(pool, "a")
    used(pool, "c")
    assert disk.reads == ["a", "b", "c", "d"]
    used(pool, "b")
    assert disk.reads[-1] == "b"


def test_what_is_in_use_stays(make_pool, disk):
    pool = make_pool(2, 2)
    a, b = pool.try_take(ref("a")), pool.try_take(ref("b"))
    settled(pool)
    assert pool.try_take(ref("c")) is None
    pool.give_back(a)
    assert pool.try_take(ref("c")) is not None
    settled(pool)
    assert pool.num_loaded == 2 and b.weights is not None
    pool.check()


def test_no_more_in_use_than_allowed(make_pool):
    pool = make_pool(5, 2)
    a, _ = pool.try_take(ref("a")), pool.try_take(ref("b"))
    assert pool.try_take(ref("c")) is None
    again = pool.try_take(ref("a"))
    assert again is a and pool.num_in_use == 2
    settled(pool)
    pool.give_back(a)
    assert pool.num_in_use == 2
    pool.give_back(a)
    assert pool.num_in_use == 1 and pool.num_loaded == 2


def test_reading_does_not_block_and_is_done_once(make_pool, disk):
    pool = make_pool(2, 2)
    disk.gate.clear()
    first, second = pool.try_take(ref("a")), pool.try_take(ref("a"))
    assert first is second and first.weights is None and pool.is_loading
    assert not pool.settle()
    disk.gate.set()
    settled(pool)
    assert first.weights is not None and disk.reads == ["a"]


def test_pinned_ones_stay(make_pool, disk):
    pool = make_pool(2, 1)
    used(pool, "a", is_pinned=True)
    for name in "bcd":
        used(pool, name)
    used(pool, "a")
    assert disk.reads == ["a", "b", "c", "d"]


def answers(pool: AdapterPool) -> list:
    got = []
    while pool.is_loading:
        pool.wait(1)
        got += pool.take_answers()
    return got


def test_loads_are_answered_in_order_and_kept(make_pool, disk):
    pool = make_pool(3, 3)
    disk.errors["bad"] = InvalidRequest("it is bad", slug="invalid_adapter")
    for name in ("a", "bad", "b"):
        pool.begin_load(name, False)
    a, bad, b = answers(pool)
    assert (a.digest, a.rank, a.num_bytes, a.error) == ("a", 4, 100, None)
    assert bad.error == "it is bad" and bad.slug == "invalid_adapter"
    assert b.directory == "b" and pool.num_loaded == 2
    used(pool, "a")
    assert disk.reads == ["a", "bad", "b"]


def test_of_those_to_be_checked_one_is_in_memory_at_a_time(make_pool, disk):
    pool = make_pool(2, 2)
    for name in "abcdef":
        pool.begin_load(name, False)
    pool._reader.submit(lambda: None).result(10)  # after all that the reader was given
    assert disk.reads == ["a"]
    assert [answer.digest for answer in answers(pool)] == list("abcdef")
    assert pool.num_loaded == 2


def test_a_load_without_room_is_only_checked(make_pool, disk):
    pool = make_pool(1, 1)
    place = pool.try_take(ref("a"))
    settled(pool)
    pool.begin_load("b", False)
    assert answers(pool)[0].error is None
    assert pool.num_loaded == 1 and place.weights is not None


def test_pins_leave_a_place_for_others(make_pool):
    pool = make_pool(2, 1)
    pool.begin_load("a", True)
    pool.begin_load("b", True)
    pool.begin_load("a", True)
    first, second, third = answers(pool)
    assert first.error is None and third.error is None
    assert second.slug == "too_many_pinned"
    used(pool, "c")


def test_requests_for_pinned_ones_leave_a_place_for_others_too(make_pool):
    """As after a restart of the engine, which has forgotten what was pinned."""
    pool = make_pool(2, 1)
    pool.begin_load("a", True)
    assert answers(pool)[0].error is None
    used(pool, "b", is_pinned=True)
    used(pool, "c")


def test_an_unexpected_error_ends_one_load(make_pool, disk):
    pool = make_pool(2, 2)
    disk.errors["a"] = RuntimeError("oops")
    pool.begin_load("a", False)
    assert answers(pool)[0].slug == "invalid_adapter"
    used(pool, "b")


def test_changed_files_are_not_served(make_pool, disk):
    pool = make_pool(1, 1)
    used(pool, "a")
    used(pool, "b")
    disk.digests["a"] = "other"
    place = pool.try_take(ref("a"))
    settled(pool)
    assert place.weights is None and isinstance(place.error, NotFound)
    assert place.error.slug == "adapter_not_found" and "changed" in place.error.message
    pool.check()
    pool.give_back(place)
    pool.check()
    assert pool.num_loaded == 0 and pool.num_in_use == 0


def test_forgetting(make_pool, disk):
    pool = make_pool(3, 3)
    used(pool, "a")
    pool.forget("a")
    pool.forget("unknown")
    assert pool.num_loaded == 0
    place = pool.try_take(ref("b"))
    settled(pool)
    pool.forget("b")
    assert pool.num_loaded == 1 and place.weights is not None, "its user keeps it"
    pool.give_back(place)
    assert pool.num_loaded == 0
    pool.check()


def test_a_request_that_leaves_while_its_adapter_is_read(make_pool, disk):
    pool = make_pool(1, 1)
    disk.gate.clear()
    pool.give_back(pool.try_take(ref("a")))
    assert pool.num_in_use == 0
    assert pool.try_take(ref("b")) is None, "the place is taken until the reading ends"
    disk.gate.set()
    settled(pool)
    used(pool, "b")
    pool.check()
