"""Texts of many requests, packed into batches, to vectors: the embedding half of `EngineCore`."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from engine.core.messages import Embedded, EmbeddingInfo, EmbedRequest, Failed, ToServer
from engine.core.step_board import StepBoard
from engine.errors import EngineError, InternalError, InvalidRequest, Overloaded
from engine.scheduling.adapter_queue import AdapterLine

if TYPE_CHECKING:
    from engine.adapters.lora import AdapterReader

logger = logging.getLogger(__name__)

MAX_WAITING_BYTES = 256 * 2**20
"""Token ids and vectors of all requests that are not answered; one more is refused."""
SLICE_S = 0.005
"""What an embedding gets at least before generation has its turn again."""

Texts = Sequence[np.ndarray]


class Embedder(Protocol):
    """Turns token ids into vectors. Implemented in `engine.runner`, and by fakes in tests."""

    info: EmbeddingInfo
    max_step_tokens: int
    """Tokens of a batch; a text that is longer comes alone."""
    adapter_reader: AdapterReader | None
    """Of adapters for this model; None if it takes none."""

    def compute(
        self, texts: Texts, second_starts: Sequence[int], adapters: Sequence[Any]
    ) -> Generator[None, None, np.ndarray]:
        """Vectors float32 [texts, size], of texts int32 [length]; yields between slices of the work.

        `second_starts` tells for each text where the second of a pair begins: its end if it is none.
        `adapters` are the weights of each text's adapter, None for the model alone.

        It may be closed at a yield. A vector depends on nothing but its own text and adapter.
        """
        ...


class _Job:
    """One request on its way."""

    def __init__(self, request: EmbedRequest, size: int) -> None:
        ends = np.cumsum(request.lens)
        self.request_id = request.request_id
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


class EmbeddingCore:
    """Queue and batches. `submit`, `cancel` and `step` belong to the engine's thread.

    Requests take turns, one text a turn, so that a request for one text passes one for a thousand;
    texts of all of them share a batch, up to the embedder's budget of tokens. Every accepted request
    ends in one `Embedded` or one `Failed`; a cancelled one ends in silence. A batch that raises
    fails the requests that have a text in it. `max_requests` bounds those that are not answered. On
    `board` stands whose texts are being computed. `adapters` is where its requests get theirs; one keeps
    it until none of its texts is being computed.
    """

    def __init__(
        self,
        embedder: Embedder,
        *,
        max_requests: int,
        board: StepBoard | None = None,
        adapters: AdapterLine[_Job] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.info = embedder.info
        self.num_tokens = 0
        """Tokens of finished batches, since the start."""
        self._embedder = embedder
        self._max_requests = max_requests
        self._board = board
        self._adapters = adapters
        self._clock = clock
        self._jobs: dict[str, _Job] = {}
        self._turns: deque[_Job] = deque()
        self._num_bytes = 0
        self._batch: list[tuple[_Job, np.ndarray]] = []
        self._second_starts: list[int] = []
        self._work: Generator[None, None, np.ndarray] | None = None

    def __len__(self) -> int:
        """Requests that are not answered."""
        return len(self._jobs)

    @property
    def can_compute(self) -> bool:
        """Whether there is something to compute before an adapter has been read."""
        return bool(self._turns) or self._work is not None

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._jobs

    def submit(self, request: EmbedRequest) -> None:
        """Queue a request. Raises: `InvalidRequest`, or `Overloaded` when there is no place."""
        self._check(request)
        job = _Job(request, self.info.size)
        if len(self._jobs) >= self._max_requests or self._num_bytes + job.num_bytes > MAX_WAITING_BYTES:
            raise Overloaded("The request queue is full.", slug="queue_full")
        self._jobs[request.request_id] = job
        if job.adapter_ref is None or self._adapters is None:
            self._turns.append(job)
        else:
            self._adapters.push(job)
        self._num_bytes += job.num_bytes

    def cancel(self, request_id: str) -> None:
        """Forget a request; unknown ids are ignored."""
        job = self._jobs.get(request_id)
        if job is None:
            return
        self._end(job)
        if all(other.is_over for other, _ in self._batch):
            self._drop_batch()

    def step(self, time_s: float) -> list[ToServer]:
        """Compute for about `time_s` seconds, and at least one slice; what came of it."""
        answers = self._queue_those_with_adapter()
        until_s = self._clock() + max(time_s, SLICE_S)
        while self.can_compute:
            if self._work is None:
                self._batch = self._take_batch()
                adapters = [job.adapter and job.adapter.weights for job, _ in self._batch]
                self._work = self._embedder.compute(
                    [text for _, text in self._batch], self._second_starts, adapters
                )
            try:
                vectors = self._advance(self._work)
                if vectors is not None:
                    answers += self._finish(vectors)
            except Exception:
                logger.exception("an embedding batch failed; its requests are ended")
                answers += self._fail("The engine failed while it computed this request.")
            if self._clock() >= until_s:
                break
        return answers

    def _queue_those_with_adapter(self) -> list[ToServer]:
        """Those whose adapter could not be had are answered."""
        refused: list[ToServer] = []
        for job in () if self._adapters is None else self._adapters.take_ready():
            if job.adapter.error is None:
                self._turns.append(job)
            else:
                refused.append(Failed.from_error(job.request_id, job.adapter.error))
                self._end(job)
        return refused

    def _advance(self, work: Generator[None, None, np.ndarray]) -> np.ndarray | None:
        """The next slice of a batch; its vectors when that was the last one."""
        if self._board is not None:
            self._board.begin_step(dict.fromkeys(job.request_id for job, _ in self._batch))
        try:
            next(work)
        except StopIteration as end:
            return end.value
        finally:
            if self._board is not None:
                self._board.end_step()
        return None

    def _check(self, request: EmbedRequest) -> None:
        if request.request_id in self._jobs:
            raise InvalidRequest(f"Invalid request: the request id {request.request_id!r} is in use")
        lens, num_bytes = request.lens, len(request.token_ids)
        if not lens or min(lens) < 1 or sum(lens) * 4 != num_bytes:
            raise InvalidRequest("Invalid request: every text needs at least one token", param="input")
        if request.adapter is not None and (self._adapters is None or not self.info.takes_adapters):
            raise InvalidRequest("Invalid request: the model takes no adapters", param="lora_path")
        starts = request.second_starts
        if starts and (
            len(starts) != len(lens) or any(not 0 <= s <= n for s, n in zip(starts, lens, strict=True))
        ):
            raise InvalidRequest("Invalid request: a pair has no such place", param="input")
        if max(lens) > self.info.max_len:
            raise InvalidRequest(
                f"Invalid request: a text has {max(lens)} tokens, but the longest that the embedding model "
                f"takes is {self.info.max_len}",
                slug="context_length_exceeded",
                param="input",
            )
        token_ids = np.frombuffer(request.token_ids, "<i4")
        if token_ids.min() < 0 or token_ids.max() >= self.info.vocab_size:
            raise InvalidRequest(
                f"Invalid request: a token id is outside of [0, {self.info.vocab_size})", param="input"
            )

    def _take_batch(self) -> list[tuple[_Job, np.ndarray]]:
        batch: list[tuple[_Job, np.ndarray]] = []
        num_tokens = 0
        self._second_starts = []
        while self._turns:
            job = self._turns[0]
            text = job.texts[job.num_taken]
            if batch and (job.runs_alone or num_tokens + len(text) > self._embedder.max_step_tokens):
                break
            batch.append((job, text))
            self._second_starts.append(job.second_starts[job.num_taken])
            num_tokens += len(text)
            job.num_taken += 1
            self._turns.popleft()
            if job.num_taken < len(job.texts):
                self._turns.append(job)
            if job.runs_alone:
                break
        return batch

    def _finish(self, vectors: np.ndarray) -> list[ToServer]:
        if not np.isfinite(vectors).all():
            return self._fail("The model computed no usable numbers.")
        answers: list[ToServer] = []
        for (job, text), vector in zip(self._batch, vectors, strict=True):
            self.num_tokens += len(text)
            job.vectors[job.num_done] = vector
            job.num_done += 1
            if job.num_done == len(job.texts) and not job.is_over:
                self._end(job)
                answers.append(Embedded(job.request_id, job.vectors.astype("<f4", copy=False).tobytes()))
        self._drop_batch()
        return answers

    def _fail(self, message: str) -> list[ToServer]:
        jobs = {id(job): job for job, _ in self._batch if not job.is_over}
        self._drop_batch()
        for job in jobs.values():
            self._end(job)
        error: EngineError = InternalError(message)
        return [Failed.from_error(job.request_id, error) for job in jobs.values()]

    def _end(self, job: _Job) -> None:
        job.is_over = True
        del self._jobs[job.request_id]
        self._num_bytes -= job.num_bytes
        if job.num_taken < len(job.texts) and job in self._turns:
            self._turns.remove(job)
        if all(other is not job for other, _ in self._batch):
            self._release_adapter(job)

    def _drop_batch(self) -> None:
        if self._work is not None:
            self._work.close()
        jobs = {id(job): job for job, _ in self._batch}
        self._batch, self._work = [], None
        for job in jobs.values():
            if job.is_over:
                self._release_adapter(job)

    def _release_adapter(self, job: _Job) -> None:
        if self._adapters is not None and job.adapter_ref is not None:
            self._adapters.release(job)
