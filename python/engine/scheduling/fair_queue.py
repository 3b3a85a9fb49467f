"""Shares running slots and places in the queue between clients, so that a busy one starves nobody."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from engine.scheduling.queued import Queued
from engine.scheduling.waiting_queue import WaitingQueue

Q = TypeVar("Q", bound=Queued)


class FairQueue(Generic[Q]):
    """Requests without a running slot. Preempted ones come first, oldest first, whoever sent them.

    Else the next slot goes to the client that holds the fewest for its weight; among equals to the one
    that was admitted least, for its weight, while it was waiting. Which of its requests that is, its own
    queue says. Slots are what clients compete for: all running requests advance in every step.
    A turn, once given, is kept until it is used: nobody is overtaken while waiting for blocks.

    Every popped request comes back through `left`. Cost: O(clients that have requests) for a turn.
    """

    def __init__(self, make_queue: Callable[[], WaitingQueue]) -> None:
        self._make_queue = make_queue
        self._preempted: list[Q] = []
        self._fresh: dict[str, WaitingQueue] = {}  # by client; none is empty
        self._num_running: dict[str, int] = {}  # by client; none is zero
        self._num_preempted: dict[str, int] = {}  # likewise
        self._weights: dict[str, float] = {}
        self._served: dict[str, float] = {}
        self._clock = 0.0  # what whoever was admitted last had been served
        self._turn: str | None = None

    def __len__(self) -> int:
        return len(self._preempted) + sum(map(len, self._fresh.values()))

    def __iter__(self) -> Iterator[Q]:
        return itertools.chain(self._preempted, *self._fresh.values())

    def push(self, request: Q) -> None:
        client = request.client
        if client not in self._fresh:
            self._fresh[client] = self._make_queue()
            # Time without a request is no credit.
            self._served[client] = max(self._served.get(client, 0.0), self._clock)
        self._weights[client] = request.weight
        self._fresh[client].push(request)

    def push_preempted(self, request: Q) -> None:
        bisect.insort(self._preempted, request, key=lambda r: r.arrival)
        _add(self._num_preempted, request.client, 1)

    def remove(self, request: Q) -> None:
        """Raises: `ValueError` when it is not waiting."""
        client = request.client
        queue = self._fresh.get(client)
        if queue is None or request not in queue:
            self._preempted.remove(request)
            _add(self._num_preempted, client, -1)
        else:
            queue.remove(request)
            if not queue:
                del self._fresh[client]
                self._turn = None if self._turn == client else self._turn
        self._forget(client)

    def peek(self) -> Q | None:
        """Whose turn it is."""
        if self._preempted:
            return self._preempted[0]
        if self._turn is None and self._fresh:
            self._turn = min(self._fresh, key=self._need)
        return None if self._turn is None else self._fresh[self._turn].peek()

    def pop(self) -> Q:
        """Take the one whose turn it is. Raises: `IndexError` when the queue is empty."""
        request = self.peek()
        if request is None:
            raise IndexError("the waiting queue is empty")
        client = request.client
        _add(self._num_running, client, 1)
        if self._preempted:
            self._preempted.pop(0)
            _add(self._num_preempted, client, -1)
            return request
        self._clock = self._served[client]
        self._served[client] += 1 / self._weights[client]
        queue, self._turn = self._fresh[client], None
        queue.pop()
        if not queue:
            del self._fresh[client]
        return request

    def left(self, request: Q) -> None:
        """A popped request gave its slot back."""
        _add(self._num_running, request.client, -1)
        self._forget(request.client)

    def displaceable(self, client: str, weight: float, n: int) -> list[Q]:
        """Waiting requests that make room for n choices of `client`, newest first; empty if none must.

        They are of the client that has the most for its weight, if that still has no less than
        `client` would have.
        """
        if not self._fresh:
            return []
        heaviest = max(self._fresh, key=lambda c: self._num_live(c) / self._weights[c])
        own = (self._num_live(client) + n) / weight
        if heaviest == client or (self._num_live(heaviest) - n) / self._weights[heaviest] < own:
            return []
        return sorted(self._fresh[heaviest], key=lambda r: (r.priority, -r.arrival))

    def _need(self, client: str) -> tuple[float, float]:
        return self._num_running.get(client, 0) / self._weights[client], self._served[client]

    def _num_live(self, client: str) -> int:
        num_fresh = len(self._fresh.get(client, ()))
        return num_fresh + self._num_running.get(client, 0) + self._num_preempted.get(client, 0)

    def _forget(self, client: str) -> None:
        if self._num_live(client) == 0:
            self._weights.pop(client, None)
            if self._served.get(client, 0.0) <= self._clock:
                self._served.pop(client, None)


def _add(counts: dict[str, int], name: str, amount: int) -> None:
    counts[name] = counts.get(name, 0) + amount
    if not counts[name]:
        del counts[name]
