"""Texts of many requests, packed into batches, to vectors: the embedding half of `EngineCore`."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from engine.core.embedding_queue import EmbeddingJob, EmbeddingQueue
from engine.core.messages import Admitted, Embedded, EmbeddingInfo, EmbedRequest, Failed, ToServer
from engine.core.step_board import StepBoard
from engine.errors import DeviceLost, EngineError, InternalError, InvalidRequest
from engine.log import request_name
from engine.scheduling.adapter_queue import AdapterLine
from engine.scheduling.admission import displaced_error
from engine.scheduling.settings import Places

if TYPE_CHECKING:
    from engine.adapters.lora import AdapterReader

logger = logging.getLogger(__name__)

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


class EmbeddingCore:
    """Queue and batches. `submit`, `cancel` and `step` belong to the engine's thread.

    Requests that run take turns, one text a turn, so that a request for one text passes one for a
    thousand; texts of all of them share a batch, up to the embedder's budget of tokens. Every accepted
    request has one `Admitted` when it runs, and ends in one `Embedded` or one `Failed`; a cancelled one
    ends in silence. A batch that raises fails the requests that have a text in it. On `board` stands
    whose texts are being computed. `adapters` is where its requests get theirs; one keeps it until none
    of its texts is being computed.
    """

    def __init__(
        self,
        embedder: Embedder,
        *,
        places: Places,
        board: StepBoard | None = None,
        adapters: AdapterLine[EmbeddingJob] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.info = embedder.info
        self.num_tokens = 0
        """Tokens of finished batches, since the start."""
        self.num_batches = 0
        """Those, since the start."""
        self._embedder = embedder
        self._board = board
        self._clock = clock
        self._queue = EmbeddingQueue(places, adapters)
        self._turns: deque[EmbeddingJob] = deque()
        self._batch: list[tuple[EmbeddingJob, np.ndarray]] = []
        self._second_starts: list[int] = []
        self._work: Generator[None, None, np.ndarray] | None = None

    def __len__(self) -> int:
        """Requests that are not answered."""
        return len(self._queue)

    @property
    def can_compute(self) -> bool:
        """Whether there is something to compute before an adapter has been read."""
        return self._queue.num_queued > 0 or bool(self._turns) or self._work is not None

    @property
    def queue(self) -> EmbeddingQueue:
        """Who runs and who waits; for looking at."""
        return self._queue

    def submit(self, request: EmbedRequest) -> list[ToServer]:
        """Queue a request; refusals of others, which had to make room for it.

        Raises: `InvalidRequest`, or `Overloaded` when there is no place.
        """
        self._check(request)
        displaced = self._queue.submit(EmbeddingJob(request, self.info.size))
        return [Failed.from_error(job.request_id, displaced_error()) for job in displaced]

    def cancel(self, request_id: str) -> None:
        """Forget a request; unknown ids are ignored."""
        job = self._queue.get(request_id)
        if job is None:
            return
        self._end(job)
        if all(other.is_over for other, _ in self._batch):
            self._drop_batch()

    def step(self, time_s: float) -> list[ToServer]:
        """Compute for about `time_s` seconds, and at least one slice; what came of it."""
        answers: list[ToServer] = []
        for job in self._queue.take_without_adapter():
            answers.append(Failed.from_error(job.request_id, job.adapter.error))
            self._end(job)
        until_s = self._clock() + max(time_s, SLICE_S)
        while self.can_compute:
            if self._work is None:
                for job in self._queue.admit():
                    self._turns.append(job)
                    answers.append(Admitted(job.request_id, 0, 0))
                self._batch = self._take_batch()
                adapters = [job.adapter and job.adapter.weights for job, _ in self._batch]
                self._work = self._embedder.compute(
                    [text for _, text in self._batch], self._second_starts, adapters
                )
            try:
                vectors = self._advance(self._work)
                if vectors is not None:
                    answers += self._finish(vectors)
            except DeviceLost:
                raise  # nobody can be served any more, and on the board stands who it may have been
            except Exception:
                self._end_on_board()
                jobs = dict.fromkeys(request_name(job.request_id, job.trace_id) for job, _ in self._batch)
                logger.exception("an embedding batch failed, and with it %s", ", ".join(jobs))
                answers += self._fail("The engine failed while it computed this request.")
            if self._clock() >= until_s:
                break
        return answers

    def _advance(self, work: Generator[None, None, np.ndarray]) -> np.ndarray | None:
        """The next slice of a batch; its vectors when that was the last one."""
        if self._board is not None:
            self._board.begin_step(dict.fromkeys(job.request_id for job, _ in self._batch))
        vectors = None
        try:
            next(work)
        except StopIteration as end:
            vectors = end.value
        self._end_on_board()
        return vectors

    def _end_on_board(self) -> None:
        if self._board is not None:
            self._board.end_step()

    def _check(self, request: EmbedRequest) -> None:
        if request.request_id in self._queue:
            raise InvalidRequest(f"Invalid request: the request id {request.request_id!r} is in use")
        lens, num_bytes = request.lens, len(request.token_ids)
        if not lens or min(lens) < 1 or sum(lens) * 4 != num_bytes:
            raise InvalidRequest("Invalid request: every text needs at least one token", param="input")
        if request.adapter is not None and (not self._queue.has_adapters or not self.info.takes_adapters):
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

    def _take_batch(self) -> list[tuple[EmbeddingJob, np.ndarray]]:
        batch: list[tuple[EmbeddingJob, np.ndarray]] = []
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
        self.num_batches += 1
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

    def _end(self, job: EmbeddingJob) -> None:
        self._queue.end(job)
        if job in self._turns:
            self._turns.remove(job)
        if all(other is not job for other, _ in self._batch):
            self._queue.release_adapter(job)

    def _drop_batch(self) -> None:
        if self._work is not None:
            self._work.close()
        jobs = {id(job): job for job, _ in self._batch}
        self._batch, self._work = [], None
        for job in jobs.values():
            if job.is_over:
                self._queue.release_adapter(job)
