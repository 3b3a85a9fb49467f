"""Requests whose adapter is not ready: no place for it yet, or still being read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, Protocol

from engine.core.messages import AdapterRef
from engine.errors import EngineError
from engine.scheduling.request import Request

MAX_PASSING = 32
"""How many others may take a place in a row before the oldest request without one has its turn."""


class AdapterPlace(Protocol):
    """An adapter that is lent to a request; `weights` or `error` is set once it has been read."""

    weights: Any
    error: EngineError | None


class AdapterSlots(Protocol):
    """What the scheduler needs of `adapters.adapter_pool.AdapterPool`."""

    @property
    def num_in_use(self) -> int: ...
    def try_take(self, ref: AdapterRef) -> AdapterPlace | None: ...
    def give_back(self, place: Any) -> None: ...
    def settle(self) -> bool: ...
    def check(self) -> None: ...


class AdapterQueue:
    """Gives requests their adapters, before they queue for a running slot and until they end.

    Oldest first, but whoever's adapter has a place goes ahead of those that wait for one. When
    `MAX_PASSING` have done so, nobody passes the oldest one any more: adapters run out of users, and
    its own gets a place. So every request waits for a bounded number of others.

    Cost: next to nothing while nobody waits; else linear in those that wait, when something has changed.
    """

    def __init__(self, slots: AdapterSlots) -> None:
        self._slots = slots
        self._waiting: OrderedDict[Request, None] = OrderedDict()
        self._reading: dict[Request, None] = {}
        self._num_passing = 0
        self._has_changed = False

    def __len__(self) -> int:
        return len(self._waiting) + len(self._reading)

    def __contains__(self, request: Request) -> bool:
        return request in self._waiting or request in self._reading

    def __iter__(self) -> Iterator[Request]:
        yield from self._waiting
        yield from self._reading

    def push(self, request: Request) -> None:
        self._waiting[request] = None
        self._has_changed = True

    def release(self, request: Request) -> None:
        """Forget a request that ended or was cancelled, and give its adapter back."""
        self._waiting.pop(request, None)
        self._reading.pop(request, None)
        if request.adapter is not None:
            self._slots.give_back(request.adapter)
            request.adapter = None
            self._has_changed = True

    def take_ready(self) -> list[Request]:
        """Those whose adapter is ready now, or cannot be had: then its `error` is set."""
        self._has_changed |= self._slots.settle()  # also what nobody waits for any more
        if not self or not self._has_changed:
            return []
        self._has_changed = False
        self._hand_out()
        ready = [r for r in self._reading if r.adapter.weights is not None or r.adapter.error is not None]
        for request in ready:
            del self._reading[request]
        return ready

    def _hand_out(self) -> None:
        without_place: set[str] = set()
        for request in list(self._waiting):
            assert request.adapter_ref is not None
            is_oldest = request is next(iter(self._waiting))
            if not is_oldest and self._num_passing >= MAX_PASSING:
                return
            if request.adapter_ref.digest in without_place:
                continue
            request.adapter = self._slots.try_take(request.adapter_ref)
            if request.adapter is None:
                without_place.add(request.adapter_ref.digest)
                continue
            self._num_passing = 0 if is_oldest else self._num_passing + 1
            del self._waiting[request]
            self._reading[request] = None
