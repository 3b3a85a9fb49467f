"""Which adapters are in memory; what is read is played by the test."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
import weakref

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


class Disk:
    """Adapters to be read. While `gate` is not set, reading waits."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.checks: list[str] = []
        self.reads: list[str] = []
        self.digests: dict[str, str] = {}
        self.errors: dict[str, Exception] = {}

    def check(self, directory: str) -> Loaded:
        return self._found(directory, self.checks)

    def load(self, directory: str) -> Loaded:
        return self._found(directory, self.reads)

    def _found(self, directory: str, log: list[str]) -> Loaded:
        assert self.gate.wait(10)
        log.append(directory)
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
        pools.append(AdapterPool(disk, max_loaded=max_loaded, max_in_use=max_in_use))
        return pools[-1]

    yield make
    disk.gate.set()
    for pool in pools:
        pool.close()


def ref(name: str, **fields) -> AdapterRef:
    return AdapterRef(name, name, **fields)


def settled(pool: AdapterPool) -> None:
    deadline = time.monotonic() + 60
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
        pool.settle()
        got += pool.take_answers()
        pool.check()
    return got


def test_loads_are_answered_in_order_and_kept(make_pool, disk):
    pool = make_pool(3, 3)
    disk.errors["bad"] = InvalidRequest("it is bad", slug="invalid_adapter")
    for name in ("a", "bad", "b"):
        pool.begin_load(name, False)
    a, bad, b = answers(pool)
    assert (a.digest, a.rank, a.error) == ("a", 4, None)
    assert bad.error == "it is bad" and bad.slug == "invalid_adapter"
    assert b.directory == "b" and pool.num_loaded == 2
    used(pool, "a")
    assert disk.checks == ["a", "bad", "b"] and disk.reads == ["a", "b"]


def test_of_those_to_be_checked_one_is_in_memory_at_a_time(make_pool, disk):
    pool = make_pool(2, 2)
    for name in "abcdef":
        pool.begin_load(name, False)
    pool._thread.submit(lambda: None).result(60)  # after all that the reader was given
    assert disk.checks == ["a"] and disk.reads == []
    assert [answer.digest for answer in answers(pool)] == list("abcdef")
    assert pool.num_loaded == 2


class Weights:
    pass


class CountingDisk(Disk):
    """Knows how many of the weights that it gave are in memory, and how many were at most."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: weakref.WeakSet = weakref.WeakSet()
        self.most_alive = 0

    def load(self, directory: str) -> Loaded:
        weights = Weights()
        self.alive.add(weights)
        self.most_alive = max(self.most_alive, len(self.alive))
        self.reads.append(directory)
        return Loaded(directory, weights)


@pytest.mark.parametrize(("max_loaded", "max_in_use"), [(1, 1), (2, 1), (3, 3), (5, 2)])
def test_never_more_in_memory_than_allowed(max_loaded, max_in_use):
    """While others are read, checked, evicted, forgotten and given back in any order."""
    for seed in range(20):
        chooser, disk = random.Random(seed), CountingDisk()
        pool = AdapterPool(disk, max_loaded=max_loaded, max_in_use=max_in_use)
        lent = []
        for _ in range(300):
            name = chooser.choice("abcdefgh")
            match chooser.randrange(7):
                case 0 | 1:
                    if (place := pool.try_take(ref(name))) is not None:
                        lent.append(place)
                case 2 | 3 if lent:
                    pool.give_back(lent.pop(chooser.randrange(len(lent))))
                case 4:
                    pool.begin_load(name, chooser.random() < 0.2)
                case 5:
                    chooser.choice((pool.forget, pool.unpin))(name)
                case _:
                    pool.settle()
                    pool.take_answers()
            place = None
            pool.check()
            assert len(disk.alive) <= max_loaded
        while lent:
            pool.give_back(lent.pop())
        assert all(answer.error is None or answer.slug == "too_many_pinned" for answer in answers(pool))
        pool.check()
        assert disk.most_alive <= max_loaded and len(disk.reads) > 10
        pool.close()


def test_what_cannot_be_used_drives_nothing_out(make_pool, disk):
    pool = make_pool(2, 1)
    disk.errors["bad"] = InvalidRequest("it is bad", slug="invalid_adapter")
    used(pool, "a")
    used(pool, "b")
    for name in ("bad", "a", "b"):
        pool.begin_load(name, False)
    assert [answer.slug for answer in answers(pool)] == ["invalid_adapter", "", ""]
    assert pool.num_evictions == 0 and disk.reads == ["a", "b"]


def test_files_that_change_between_their_check_and_their_reading(make_pool, disk):
    pool = make_pool(2, 1)
    pool.begin_load("a", False)
    pool._asked[0].check.result(60)
    disk.digests["a"] = "other"
    (answer,) = answers(pool)
    assert answer.slug == "adapter_not_found" and "changed" in answer.error
    assert pool.num_loaded == 0


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


def test_a_place_comes_free_when_a_pinned_one_is_forgotten_or_unpinned(make_pool):
    """Whoever waits for a place is told, as nothing is given back then."""
    for call in (AdapterPool.forget, AdapterPool.unpin):
        pool = make_pool(2, 2)
        pool.begin_load("a", True)
        assert answers(pool)[0].error is None
        place = pool.try_take(ref("b"))
        settled(pool)
        assert pool.try_take(ref("c")) is None
        assert not pool.settle()
        call(pool, "a")
        call(pool, "unknown")
        assert pool.settle() and not pool.settle()
        assert pool.try_take(ref("c")) is not None and place.weights is not None
        settled(pool)
        pool.check()


def test_a_load_of_a_pinned_one_leaves_it_pinned_until_it_is_unpinned(make_pool, disk):
    pool = make_pool(2, 1)
    for is_pinned in (True, False):
        pool.begin_load("a", is_pinned)
        assert answers(pool)[0].error is None
    for name in "bcd":
        used(pool, name)
    used(pool, "a")
    assert disk.reads == list("abcd")
    pool.unpin("a")
    for name in "bca":
        used(pool, name)
    assert disk.reads == list("abcdbca")


def test_forgotten_while_it_is_read(make_pool, disk):
    pool = make_pool(1, 1)
    disk.gate.clear()
    pool.give_back(pool.try_take(ref("a")))
    pool.forget("a")
    assert pool.try_take(ref("b")) is None, "it takes its place until it has been read"
    disk.gate.set()
    settled(pool)
    assert pool.num_loaded == 0 and pool.num_evictions == 0
    used(pool, "b")


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
