"""Which of the requests of one client is admitted next."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from engine.scheduling.queued import Queued

Q = TypeVar("Q", bound=Queued)

WINDOW = 64
"""How many of the oldest waiting requests `lpm` compares."""
MAX_PASSING = 32
"""How many others may be admitted in a row before the oldest request has its turn."""


class WaitingQueue(Generic[Q]):
    """Requests that have not run yet. The highest priority goes first; among equals the oldest (fcfs), or
    that with the longest cached prefix of the `WINDOW` oldest (lpm). Of `MAX_PASSING` + 1 admissions in a
    row at least one is that of the oldest request, whatever its priority, so every request is admitted
    after a bounded number of others. A turn, once given, is kept until it is used.

    Cost: O(different priorities); lpm looks up `WINDOW` prefixes when a new turn is given.
    """

    def __init__(self, policy: str, cached_prefix_len: Callable[[Q], int]) -> None:
        self._policy = policy
        self._cached_prefix_len = cached_prefix_len
        self._levels: dict[int, OrderedDict[Q, None]] = {}  # fresh ones, by priority; none is empty
        self._num_fresh = 0
        self._turn: Q | None = None
        self._num_passing = 0

    def __len__(self) -> int:
        return self._num_fresh

    def __iter__(self) -> Iterator[Q]:
        return itertools.chain(*self._levels.values())

    def push(self, request: Q) -> None:
        self._levels.setdefault(request.priority, OrderedDict())[request] = None
        self._num_fresh += 1

    def __contains__(self, request: Q) -> bool:
        return request in self._levels.get(request.priority, ())

    def remove(self, request: Q) -> None:
        """Raises: `KeyError` when it is not here."""
        if request is self._turn:
            self._turn = None
        level = self._levels[request.priority]
        del level[request]
        self._num_fresh -= 1
        if not level:
            del self._levels[request.priority]

    def peek(self) -> Q | None:
        """Whose turn it is."""
        if self._turn is None and self._levels:
            is_due = self._num_passing >= MAX_PASSING
            self._turn = self._oldest() if is_due else self._first_of(self._levels[max(self._levels)])
        return self._turn

    def pop(self) -> Q:
        """Take the one whose turn it is. Raises: `IndexError` when the queue is empty."""
        request = self.peek()
        if request is None:
            raise IndexError("the waiting queue is empty")
        self._num_passing = 0 if request is self._oldest() else self._num_passing + 1
        self.remove(request)
        return request

    def _oldest(self) -> Q:
        return min((next(iter(level)) for level in self._levels.values()), key=lambda r: r.arrival)

    def _first_of(self, level: OrderedDict[Q, None]) -> Q:
        if self._policy == "fcfs":
            return next(iter(level))
        return max(itertools.islice(level, WINDOW), key=self._cached_prefix_len)
