"""Who embeds and who waits: requests to embed are let in by the rules for those that generate."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from engine.core.messages import EmbedRequest
from engine.errors import Overloaded
from engine.scheduling.adapter_queue import AdapterLine
from engine.scheduling.admission import Load, check_place, make_room
from engine.scheduling.fair_queue import FairQueue
from engine.scheduling.settings import Places
from engine.scheduling.waiting_queue import WaitingQueue

MAX_WAITING_BYTES = 256 * 2**20
"""Token ids and vectors of all requests that are not answered; one more is refused."""


class EmbeddingJob:
    """One request on its way. Implements `Queued` and `AdapterUser`."""

    choice = 0
    priority = 0

    def __init__(self, request: EmbedRequest, size: int) -> None:
        ends = np.cumsum(request.lens)
        self.request_id = request.request_id
        self.trace_id = request.trace_id
        self.client, self.weight = request.client, request.weight
        self.prompt_len = int(ends[-1])
        self.arrival = 0
        self.texts = np.split(np.frombuffer(request.token_ids, "<i4"), ends[:-1])
        self.second_starts = request.second_starts or request.lens
        self.vectors = np.empty((len(self.texts), size), np.float32)
        self.num_taken = 0
        self.num_done = 0
        self.runs_alone = request.runs_alone
        self.adapter_ref = request.adapter
        self.adapter: Any = None
        self.num_bytes = len(request.token_ids) + self.vectors.nbytes
        self.is_over = False


class EmbeddingQueue:
    """Has slots and places of its own, as many as generation: neither kind of request fills those of the
    other. Slots are shared between clients by weight, and so are places once there are too few. Whoever
    asks for an adapter gets that first, in the line `adapters`.
    """

    def __init__(self, places: Places, adapters: AdapterLine[EmbeddingJob] | None = None) -> None:
        self._places = places
        self._adapters = adapters
        self._jobs: dict[str, EmbeddingJob] = {}
        self._running: dict[EmbeddingJob, None] = {}
        self._waiting: FairQueue[EmbeddingJob] = FairQueue(lambda: WaitingQueue("fcfs", lambda _: 0))
        self._arrivals = itertools.count()
        self._num_bytes = 0

    def __len__(self) -> int:
        """Jobs that are not over."""
        return len(self._jobs)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._jobs

    def get(self, request_id: str) -> EmbeddingJob | None:
        return self._jobs.get(request_id)

    @property
    def running(self) -> Iterable[EmbeddingJob]:
        return self._running

    @property
    def waiting(self) -> Iterable[EmbeddingJob]:
        return itertools.chain(self._waiting, self._adapters or ())

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_queued(self) -> int:
        """Jobs that wait for nothing but a slot."""
        return len(self._waiting)

    @property
    def has_adapters(self) -> bool:
        return self._adapters is not None

    def submit(self, job: EmbeddingJob) -> list[EmbeddingJob]:
        """Queue a job. Returns those of another client that ended to make room for it.

        Raises: `Overloaded` when there is no place, nor one that another client has too much of.
        """
        displaced = self._make_room(job)
        for other in displaced:
            self.end(other)
            self.release_adapter(other)
        job.arrival = next(self._arrivals)
        self._jobs[job.request_id] = job
        self._num_bytes += job.num_bytes
        if job.adapter_ref is None or self._adapters is None:
            self._waiting.push(job)
        else:
            self._adapters.push(job)
        return displaced

    def take_without_adapter(self) -> list[EmbeddingJob]:
        """Jobs whose adapter could not be had, to be ended; those that have theirs now queue for a slot."""
        refused = []
        for job in () if self._adapters is None else self._adapters.take_ready():
            if job.adapter.error is None:
                self._waiting.push(job)
            else:
                refused.append(job)
        return refused

    def release_adapter(self, job: EmbeddingJob) -> None:
        """None of its texts is being computed any more."""
        if self._adapters is not None and job.adapter_ref is not None:
            self._adapters.release(job)

    def admit(self) -> list[EmbeddingJob]:
        """Jobs that get a running slot now."""
        admitted = []
        while len(self._running) < self._places.max_running_requests and len(self._waiting):
            job = self._waiting.pop()
            self._running[job] = None
            admitted.append(job)
        return admitted

    def end(self, job: EmbeddingJob) -> None:
        """A job is answered, or nobody wants its answer."""
        job.is_over = True
        del self._jobs[job.request_id]
        self._num_bytes -= job.num_bytes
        if job in self._running:
            del self._running[job]
            self._waiting.left(job)
        elif job in self._waiting:
            self._waiting.remove(job)

    def _make_room(self, job: EmbeddingJob) -> list[EmbeddingJob]:
        num_tokens = sum(other.prompt_len for other in self.waiting)
        load = Load(self.num_running, len(self._jobs) - self.num_running, num_tokens)

        def check(gone: list[EmbeddingJob]) -> None:
            check_place(1, job.prompt_len, load.without(gone), self._places)
            if self._num_bytes + job.num_bytes - sum(other.num_bytes for other in gone) > MAX_WAITING_BYTES:
                raise Overloaded("The request queue holds too much text.", slug="queue_full")

        def groups() -> Iterator[list[EmbeddingJob]]:
            for other in self._waiting.displaceable(job.client, job.weight, 1):
                yield [other]

        return make_room(check, groups())
