"""Who is admitted next."""

from __future__ import annotations

import bisect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator

from engine.scheduling.request import Request

WINDOW = 64
"""How many of the oldest waiting requests `lpm` compares."""
MAX_PASSED_OVER = 32
"""How many younger requests may be admitted before the oldest one goes first."""


class WaitingQueue:
    """Requests without a running slot. Preempted ones come first, oldest first.

    fcfs: then by arrival. lpm: then the longest cached prefix first, among the `WINDOW` oldest;
    the oldest goes first once it was passed over `MAX_PASSED_OVER` times, so every request is
    admitted after a bounded number of others. The turn, once given, is kept until it is used:
    nobody is overtaken while waiting for blocks.

    Cost: O(1) for fcfs; lpm looks up `WINDOW` prefixes when a new turn is given.
    """

    def __init__(self, policy: str, cached_prefix_len: Callable[[Request], int]) -> None:
        self._policy = policy
        self._cached_prefix_len = cached_prefix_len
        self._preempted: list[Request] = []
        self._fresh: OrderedDict[Request, None] = OrderedDict()
        self._turn: Request | None = None

    def __len__(self) -> int:
        return len(self._preempted) + len(self._fresh)

    def __iter__(self) -> Iterator[Request]:
        return itertools.chain(self._preempted, self._fresh)

    def push(self, request: Request) -> None:
        self._fresh[request] = None

    def push_preempted(self, request: Request) -> None:
        bisect.insort(self._preempted, request, key=lambda r: r.arrival)

    def remove(self, request: Request) -> None:
        """Raises: `ValueError` when it is not waiting."""
        if request is self._turn:
            self._turn = None
        if request in self._fresh:
            del self._fresh[request]
        else:
            self._preempted.remove(request)

    def peek(self) -> Request | None:
        """Whose turn it is."""
        if self._preempted:
            return self._preempted[0]
        if self._policy == "fcfs" or not self._fresh:
            return next(iter(self._fresh), None)
        if self._turn is None:
            self._turn = self._longest_prefix()
        return self._turn

    def pop(self) -> Request:
        """Take the one whose turn it is. Raises: `IndexError` when the queue is empty."""
        request = self.peek()
        if request is None:
            raise IndexError("the waiting queue is empty")
        if request is self._turn:
            for other in itertools.takewhile(lambda r: r is not request, self._fresh):
                other.num_passed_over += 1
        self.remove(request)
        return request

    def _longest_prefix(self) -> Request:
        oldest = next(iter(self._fresh))
        if oldest.num_passed_over >= MAX_PASSED_OVER:
            return oldest
        return max(itertools.islice(self._fresh, WINDOW), key=self._cached_prefix_len)
