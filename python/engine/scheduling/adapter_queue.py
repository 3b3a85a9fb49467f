"""Requests whose adapter is not ready: no place for it yet, or still being read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, Generic, Protocol, TypeVar

from engine.core.messages import AdapterRef
from engine.errors import EngineError

MAX_PASSING = 32
"""How many others may take a place in a row before the oldest request without one has its turn."""


class AdapterPlace(Protocol):
    """An adapter that is lent to a request; `weights` or `error` is set once it has been read."""

    weights: Any
    error: EngineError | None


class AdapterSlots(Protocol):
    """What is needed of `adapters.adapter_pool.AdapterPool`."""

    @property
    def num_in_use(self) -> int: ...
    def try_take(self, ref: AdapterRef) -> AdapterPlace | None: ...
    def give_back(self, place: Any) -> None: ...
    def settle(self) -> bool: ...
    def check(self) -> None: ...


class AdapterUser(Protocol):
    """A request for an adapter, compared by identity. `adapter` is its place among them, once it has one."""

    adapter_ref: AdapterRef | None
    adapter: Any


User = TypeVar("User", bound=AdapterUser)


class AdapterQueue:
    """Gives requests their adapters, before they queue for anything else and until they end.

    Oldest first, but whoever's adapter has a place goes ahead of those that wait for one. When
    `MAX_PASSING` have done so, nobody passes the oldest one any more: adapters run out of users, and
    its own gets a place. So every request waits for a bounded number of others, of whatever kind: each
    kind has a `line` of its own, and all of them share the places and the turns.

    Cost: next to nothing while nobody waits; else linear in those that wait, when something has changed.
    """

    def __init__(self, slots: AdapterSlots) -> None:
        self._slots = slots
        self._waiting: OrderedDict[Any, AdapterLine[Any]] = OrderedDict()
        self._reading: dict[Any, AdapterLine[Any]] = {}
        self._num_passing = 0
        self._has_changed = False

    def line(self) -> AdapterLine[Any]:
        """Where requests of one kind come in and out."""
        return AdapterLine(self)

    def check(self) -> None:
        """Audit the books of the places. Raises: `AssertionError`."""
        self._slots.check()

    def add(self, user: AdapterUser, line: AdapterLine[Any]) -> None:
        """For `AdapterLine.push`."""
        self._waiting[user] = line
        self._has_changed = True

    def remove(self, user: AdapterUser) -> None:
        """For `AdapterLine.release`."""
        self._waiting.pop(user, None)
        self._reading.pop(user, None)
        if user.adapter is not None:
            self._slots.give_back(user.adapter)
            user.adapter = None
            self._has_changed = True

    def advance(self) -> None:
        """Hand out places, and let those out whose adapter has been read."""
        self._has_changed |= self._slots.settle()  # also what nobody waits for any more
        if not self._has_changed or not (self._waiting or self._reading):
            return
        self._has_changed = False
        self._hand_out()
        ready = [u for u in self._reading if u.adapter.weights is not None or u.adapter.error is not None]
        for user in ready:
            self._reading.pop(user).let_out(user)

    def _hand_out(self) -> None:
        without_place: set[str] = set()
        for user in list(self._waiting):
            assert user.adapter_ref is not None
            is_oldest = user is next(iter(self._waiting))
            if not is_oldest and self._num_passing >= MAX_PASSING:
                return
            if user.adapter_ref.digest in without_place:
                continue
            user.adapter = self._slots.try_take(user.adapter_ref)
            if user.adapter is None:
                without_place.add(user.adapter_ref.digest)
                continue
            self._num_passing = 0 if is_oldest else self._num_passing + 1
            self._reading[user] = self._waiting.pop(user)


class AdapterLine(Generic[User]):
    """The requests of one kind; those in it, `len` of them, have no adapter yet."""

    def __init__(self, queue: AdapterQueue) -> None:
        self._queue = queue
        self._users: dict[User, None] = {}
        self._ready: dict[User, None] = {}

    def __len__(self) -> int:
        return len(self._users)

    def __contains__(self, user: User) -> bool:
        return user in self._users

    def __iter__(self) -> Iterator[User]:
        return iter(self._users)

    def push(self, user: User) -> None:
        """Join at the end."""
        self._users[user] = None
        self._queue.add(user, self)

    def release(self, user: User) -> None:
        """Forget a request that ended or was cancelled, and give its adapter back."""
        self._users.pop(user, None)
        self._ready.pop(user, None)
        self._queue.remove(user)

    def take_ready(self) -> list[User]:
        """Those whose adapter is ready now, or cannot be had: then its `error` is set."""
        self._queue.advance()
        ready, self._ready = list(self._ready), {}
        for user in ready:
            del self._users[user]
        return ready

    def let_out(self, user: User) -> None:
        """For `AdapterQueue`: it comes with the next `take_ready`."""
        self._ready[user] = None

    def check(self) -> None:
        """Audit the books of the places. Raises: `AssertionError`."""
        self._queue.check()
