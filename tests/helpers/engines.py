"""Fakes on both sides of the engine: a runner without a model, and a client without an engine."""

from __future__ import annotations

import asyncio
import hashlib
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from engine.core.client import EngineState
from engine.core.messages import (
    AdapterLoaded,
    Admitted,
    Embedded,
    EmbeddingInfo,
    EmbedRequest,
    EngineReady,
    EngineStats,
    GenerateRequest,
    TokenChunk,
    TokenLogprobs,
)
from engine.errors import EngineError, InvalidRequest, Overloaded
from engine.scheduling.step_plan import Draw, StepPlan, StepResult, StepRow, TokenScores, Wait

_MASK = (1 << 64) - 1


def _mix(value: int) -> int:
    """splitmix64's finalizer: any changed bit of the input changes about half of the output."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


class FakeRunner:
    """A model whose whole state is in its slots, as with a real one.

    The value stored for a position depends on its token, its position and, through the block
    table, on the value of the position before it. The next token depends on everything read back
    through the block table, the seed, the choice and the output position. So a wrong block table,
    a wrong position, a block that was freed too early or a token that was never computed changes
    the answer.
    """

    def __init__(self, num_blocks: int, block_size: int, vocab_size: int = 50) -> None:
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.slots = np.zeros(num_blocks * block_size, np.uint64)
        self.num_steps = 0
        self.tokens_computed: dict[str, int] = defaultdict(int)
        """Tokens that went through the model, by request id."""
        self.plans: list[list[tuple[str, int, int, int]]] = []
        """(request id, choice, start, number of tokens) of each row of each step."""
        self.fail_next: Exception | None = None
        self.num_drafts = 0

    def launch(self, plan: StepPlan) -> Wait:
        result = self.execute(plan)
        return lambda: result

    def execute(self, plan: StepPlan) -> StepResult:
        self.num_steps += 1
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        self._check(plan)
        self.plans.append([])
        for row in plan.rows:
            self.plans[-1].append((row.request.request_id, row.request.choice, row.start, row.num_tokens))
            self._compute(row)
            self.num_drafts += row.num_drafts
        result = self._sample(plan)
        result.scores = [self._score(row) for row in plan.scored_rows]
        return result

    def _sample(self, plan: StepPlan) -> StepResult:
        draws = plan.draws
        hashes = [self._read_back(draw) for draw in draws]
        masks = [None] * len(draws) if plan.bitmask is None else plan.bitmask
        picked = [self._pick(*each) for each in zip(draws, hashes, masks, strict=True)]
        token_ids = np.array(picked, np.int32)
        wanted = [d.request.params.logprobs for d in draws if d.request.params.logprobs is not None]
        if not wanted:
            return StepResult(token_ids)
        most = max(wanted)
        logprobs = np.array([-(h % 1000) / 100 - 0.01 for h in hashes], np.float32)
        top_ids = (token_ids[:, None] + np.arange(most, dtype=np.int32)) % self.vocab_size
        top_logprobs = logprobs[:, None] - np.arange(most, dtype=np.float32)
        return StepResult(token_ids, logprobs, top_ids.astype(np.int32), top_logprobs.astype(np.float32))

    def _score(self, row: StepRow) -> TokenScores:
        """Scores depend on all tokens up to the one that is scored."""
        request, most = (
            row.request,
            max(row.request.params.prompt_logprobs or 0, row.request.params.logprobs or 0),
        )
        assert row.start <= row.scored.start and row.scored.stop <= row.start + row.num_tokens
        next_ids = request.token_ids[row.scored.start + 1 : row.scored.stop + 1]
        values = self.slots[self._slot_ids(row, row.scored.start, row.scored.stop)]
        logprobs = -((values + next_ids.astype(np.uint64)) % np.uint64(1000)).astype(np.float32) / 100
        top_ids = (next_ids[:, None] + np.arange(most, dtype=np.int32)) % self.vocab_size
        top_logprobs = logprobs[:, None] - np.arange(most, dtype=np.float32)
        return TokenScores(logprobs, top_ids.astype(np.int32), top_logprobs)

    def _check(self, plan: StepPlan) -> None:
        seen = set()
        for row in plan.rows:
            request = row.request
            assert id(request) not in seen, "two rows of one request in a step"
            seen.add(id(request))
            end = row.start + row.num_tokens
            assert row.num_tokens > 0
            known = request.num_known + row.is_ahead
            assert end - row.num_drafts == request.num_computed, "what was booked is not what is computed"
            assert end - row.num_drafts <= known, "a row reaches past the known tokens"
            assert (row.samples or row.forced) == (end - row.num_drafts == known)
            assert row.samples or not row.num_drafts
            assert end < request.max_known or not row.num_drafts, "no room for what is drawn behind a draft"
            assert not request.stop_ids.intersection(row.drafts.tolist())
            assert request.num_blocks * self.block_size >= end, "a position has no block"
            table = request.block_table[: request.num_blocks]
            assert len(np.unique(table)) == len(table), "one block twice in a block table"

    def _slot_ids(self, row: StepRow | Draw, start: int, end: int) -> np.ndarray:
        positions = np.arange(start, end)
        blocks = row.request.block_table[positions // self.block_size].astype(np.int64)
        return blocks * self.block_size + positions % self.block_size

    def _compute(self, row: StepRow) -> None:
        request = row.request
        end = row.start + row.num_tokens
        before = int(self.slots[self._slot_ids(row, row.start - 1, row.start)[0]]) if row.start else 1
        values = np.empty(row.num_tokens, np.uint64)
        for i, token in enumerate(request.token_ids[row.start : end].tolist()):
            before = _mix(before * 31 + token * 1_000_003 + row.start + i & _MASK)
            values[i] = before
        self.slots[self._slot_ids(row, row.start, end)] = values
        self.tokens_computed[request.request_id] += row.num_tokens

    def _read_back(self, draw: Draw) -> int:
        request, num_known = draw
        weights = 2 * np.arange(num_known, dtype=np.uint64) + np.uint64(1)
        with np.errstate(over="ignore"):
            total = int((self.slots[self._slot_ids(draw, 0, num_known)] * weights).sum())
        if not request.params.is_greedy:
            position = num_known - request.prompt_len
            total ^= _mix(request.seed & _MASK) ^ _mix(request.choice * 65_537 + position)
        return _mix(total)

    def _pick(self, draw: Draw, value: int, mask: np.ndarray | None) -> int:
        token, banned = value % self.vocab_size, draw.request.banned_behind(draw.num_known) or ()
        if mask is not None:
            allowed = [t for t in range(self.vocab_size) if mask[t >> 5] >> (t & 31) & 1]
            return next((t for t in allowed if t >= token and t not in banned), allowed[0])
        while token in banned:
            token = (token + 1) % self.vocab_size
        return token


class FakeEngineClient:
    """An `EngineClient` that answers from a script; for tests of everything above that seam.

    `answer` gives the output token ids of a choice, before the limits of the request: a function
    of the request and the choice, or one fixed sequence. An answer that reaches its end finishes
    with "stop" (its last token being the stop token), one that is cut by max_tokens or by the
    context with "length". Each token is one chunk. `hold()` makes streams wait before their next
    chunk until `release()`. `running` holds the ids that have unread chunks.
    """

    def __init__(
        self,
        answer: Sequence[int] | Callable[[GenerateRequest, int], Sequence[int]] = (),
        *,
        state: EngineState = EngineState.READY,
        context_length: int = 2048,
        max_running_requests: int = 8,
        cached_tokens: int = 0,
    ) -> None:
        self.answer = answer if callable(answer) else lambda request, choice: answer
        self.state = state
        self.state_reason = "" if state is EngineState.READY else f"the engine is {state.value}"
        self.ready = EngineReady(
            max_total_tokens=4 * context_length,
            max_running_requests=max_running_requests,
            block_size=16,
            context_length=context_length,
            dtype="float32",
            kv_cache_dtype="float32",
            device="cpu",
            cpu_isa="none",
            num_threads=1,
            max_queued_requests=2048,
            embedding=EmbeddingInfo(8, context_length, 257, "mean", True, takes_adapters=True),
        )
        self.cached_tokens = cached_tokens
        self.cuts: frozenset[int] | None = None
        """Numbers of output tokens after which a chunk ends; None: after each."""

        self.submitted: list[GenerateRequest] = []
        self.embedded: list[EmbedRequest] = []
        self.running: set[str] = set()
        self.cancelled: list[str] = []
        self.cancelled_choices: list[tuple[str, int]] = []
        self.num_flushes = 0
        self.adapter_loads: list[tuple[str, bool]] = []
        self.adapter_unloads: list[str] = []
        self.adapter_unpins: list[str] = []
        self.closed = False
        self.refuse_with: EngineError | None = None
        """Raised by every submit while set."""
        self.fail_with: EngineError | None = None
        """Raised by every stream before its next chunk while set."""
        self.most_tokens: int | None = None
        """Chunks that each choice may have given by now; None: any number."""

        self.retry_after_s = 7.0
        self.num_restarts = 0
        self._go = asyncio.Event()
        self._go.set()
        self._admit = asyncio.Event()
        self._admit.set()

    @property
    def info(self) -> EngineReady | None:
        return None if self.state is EngineState.LOADING else self.ready

    def set_state(self, state: EngineState, reason: str = "") -> None:
        self.state, self.state_reason = state, reason

    def hold(self) -> None:
        self._go.clear()

    def release(self) -> None:
        self._go.set()

    def hold_admission(self) -> None:
        self._admit.clear()

    def release_admission(self) -> None:
        self._admit.set()

    async def submit(self, request: GenerateRequest) -> FakeStream:
        if self.refuse_with is not None:
            raise self.refuse_with
        if self.state is not EngineState.READY:
            raise Overloaded(self.state_reason, slug="model_loading")
        self.submitted.append(request)
        try:
            if await self._is_cancelled_before(self._admit.is_set, request.request_id):
                raise InvalidRequest("Invalid request: it was cancelled")
        except asyncio.CancelledError:
            self.cancel(request.request_id)
            raise
        self.running.add(request.request_id)
        return FakeStream(self, request)

    async def embed(self, request: EmbedRequest) -> Awaitable[Embedded]:
        """Each text's first numbers are its length and its token ids; answered when `hold` ends."""
        if self.refuse_with is not None:
            raise self.refuse_with
        self.embedded.append(request)
        try:
            if await self._is_cancelled_before(self._admit.is_set, request.request_id):
                raise InvalidRequest("Invalid request: it was cancelled")
        except asyncio.CancelledError:
            self.cancel(request.request_id)
            raise
        self.running.add(request.request_id)
        return self._vectors(request)

    async def _vectors(self, request: EmbedRequest) -> Embedded:
        if await self._is_cancelled_before(self._go.is_set, request.request_id):
            raise InvalidRequest("Invalid request: it was cancelled")
        self.running.discard(request.request_id)
        if self.fail_with is not None:
            raise self.fail_with
        assert self.ready.embedding is not None
        vectors = np.zeros((len(request.lens), self.ready.embedding.size), np.float32)
        texts = np.split(np.frombuffer(request.token_ids, "<i4"), np.cumsum(request.lens)[:-1])
        for vector, text in zip(vectors, texts, strict=True):
            head = [len(text), *text.tolist()][: len(vector)]
            vector[: len(head)] = head
        return Embedded(request.request_id, vectors.tobytes())

    async def _is_cancelled_before(self, may_go: Callable[[], bool], request_id: str) -> bool:
        while not may_go() and request_id not in self.cancelled:
            await asyncio.sleep(0.001)
        return request_id in self.cancelled

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)
        self.running.discard(request_id)

    def cancel_choice(self, request_id: str, choice: int) -> None:
        self.cancelled_choices.append((request_id, choice))

    async def stats(self) -> EngineStats:
        total = self.ready.max_total_tokens // self.ready.block_size
        return EngineStats(
            num_running=len(self.running),
            num_waiting=0,
            num_blocks_total=total,
            num_blocks_free=total,
            num_blocks_cached=0,
            num_blocks_in_use=0,
            num_steps=0,
            prompt_tokens_computed=0,
            prompt_tokens_cached=0,
            output_tokens=0,
            num_preemptions=0,
            tokens_evicted=0,
            model_s=0.0,
        )

    async def dump_state(self) -> bytes:
        return b'{"running":[]}'

    async def flush(self) -> bool:
        if self.running:
            return False
        self.num_flushes += 1
        return True

    async def load_adapter(self, directory: str, is_pinned: bool = False) -> AdapterLoaded:
        """An adapter's digest is a hash of its weights file; one that is called broken is broken."""
        self.adapter_loads.append((directory, is_pinned))
        await self._go.wait()
        if "broken" in directory:
            return AdapterLoaded(directory, error="It is broken.", slug="invalid_adapter")
        data = (Path(directory) / "adapter_model.safetensors").read_bytes()
        return AdapterLoaded(directory, hashlib.sha256(data).hexdigest(), 8)

    def unload_adapter(self, digest: str) -> None:
        self.adapter_unloads.append(digest)

    def unpin_adapter(self, digest: str) -> None:
        self.adapter_unpins.append(digest)

    async def close(self) -> None:
        self.closed = True


class FakeStream:
    """The scripted chunks of one request, its choices taking turns."""

    def __init__(self, client: FakeEngineClient, request: GenerateRequest) -> None:
        self.max_unread: int | None = None
        self._client = client
        self._request = request
        seed = request.params.seed
        self.admitted = Admitted(request.request_id, 0, 4711 if seed is None else seed)

    has_unread = False

    async def __aiter__(self) -> AsyncIterator[TokenChunk]:
        client, request = self._client, self._request
        todo = [self._chunks(choice) for choice in range(request.n)]
        num_turns = 0

        def may_go() -> bool:
            return client._go.is_set() and (client.most_tokens is None or num_turns <= client.most_tokens)

        try:
            while todo:
                num_turns += 1
                for chunks in list(todo):
                    if await client._is_cancelled_before(may_go, request.request_id):
                        return
                    if client.fail_with is not None:
                        raise client.fail_with
                    if (request.request_id, chunks[0].choice) in client.cancelled_choices:
                        todo.remove(chunks)
                        continue
                    chunk = chunks.pop(0)
                    if not chunks:
                        todo.remove(chunks)
                    yield chunk
                    await asyncio.sleep(0)
        finally:
            client.running.discard(request.request_id)

    def _chunks(self, choice: int) -> list[TokenChunk]:
        return ([] if choice else self._prompt_chunks()) + self._token_chunks(choice)

    def _prompt_chunks(self) -> list[TokenChunk]:
        """Scores in pieces of two tokens; the token itself is never among the alternatives."""
        request, wanted = self._request, self._request.params.prompt_logprobs
        if wanted is None:
            return []
        scores = [
            TokenLogprobs(
                -1 - i / 8, [(t + 1 + j) % 257 for j in range(wanted)], [-0.5 - j for j in range(wanted)]
            )
            for i, t in enumerate(request.prompt_ids[1:].tolist())
        ][max(0, request.params.prompt_logprobs_start - 1) :]
        return [
            TokenChunk(request.request_id, 0, [], prompt_logprobs=scores[i : i + 2])
            for i in range(0, len(scores), 2)
        ]

    def _token_chunks(self, choice: int) -> list[TokenChunk]:
        request, params = self._request, self._request.params
        token_ids = list(self._client.answer(request, choice))
        limit = self._client.ready.context_length - len(request.prompt_ids)
        if params.max_tokens is not None:
            limit = min(limit, params.max_tokens)
        reason = "stop" if token_ids and len(token_ids) <= limit else "length"
        token_ids = token_ids[:limit]
        cached = self._client.cached_tokens
        if not token_ids:
            return [TokenChunk(request.request_id, choice, [], None, cached, "length")]
        chunks = [
            TokenChunk(request.request_id, choice, [token_id], self._logprobs(token_id), cached)
            for token_id in token_ids
        ]
        stop_id = token_ids[-1] if reason == "stop" else None
        chunks[-1] = msgspec.structs.replace(chunks[-1], finish_reason=reason, stop_token_id=stop_id)
        return chunks if self._client.cuts is None else _joined(chunks, self._client.cuts)

    def _logprobs(self, token_id: int) -> list[TokenLogprobs] | None:
        wanted = self._request.params.logprobs
        if wanted is None:
            return None
        top_ids = [token_id + i for i in range(wanted)]
        return [TokenLogprobs(-0.5, top_ids, [-0.5 - i for i in range(wanted)])]


def _joined(chunks: Sequence[TokenChunk], cuts: frozenset[int]) -> list[TokenChunk]:
    """Chunks of one token put together, but for where they are cut."""
    joined: list[TokenChunk] = []
    for i, chunk in enumerate(chunks):
        if i and i not in cuts:
            before = joined.pop()
            logprobs = None if chunk.logprobs is None else [*before.logprobs, *chunk.logprobs]
            token_ids = [*before.token_ids, *chunk.token_ids]
            chunk = msgspec.structs.replace(chunk, token_ids=token_ids, logprobs=logprobs)
        joined.append(chunk)
    return joined
