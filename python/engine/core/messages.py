"""What the server process and the engine process say to each other.

All messages are msgspec structs, encoded as msgpack arrays. One frame is a 4-byte little-endian
length followed by a list of messages. Each side batches: the engine sends a frame before a step, if
somebody was admitted or refused, and one after it; the server writes once a turn
of its loop, or a millisecond.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import msgspec
import numpy as np

from engine import errors
from engine.sampling.params import SamplingParams


class _Message(msgspec.Struct, array_like=True, frozen=True, gc=False):
    pass


# --- server to engine ---------------------------------------------------------------------


class AdapterRef(_Message):
    """An adapter as requests name it: where it is read from when it is not in memory, and a hash of what
    must be found there. One that is pinned stays in memory once it is."""

    directory: str
    digest: str
    is_pinned: bool = False


class GenerateRequest(_Message, tag=1):
    """One prompt, n choices. `prompt` is the token ids as little-endian int32 bytes.

    `namespace` separates prefix-cache entries that must never meet (cache salts; the engine adds the
    adapter). Of waiting requests those with the highest `priority` are admitted first. `runs_alone`: no
    step computes it together with another request. Running slots are shared between clients, in
    proportion to `weight`. `trace_id` is what the client calls it (x-request-id), for logs and dumps.
    """

    request_id: str
    prompt: bytes
    params: SamplingParams
    n: int = 1
    namespace: str = ""
    priority: int = 0
    runs_alone: bool = False
    adapter: AdapterRef | None = None
    client: str = ""
    weight: float = 1.0
    trace_id: str = ""

    @property
    def prompt_ids(self) -> np.ndarray:
        """Token ids, int32 [P], a read-only view."""
        return np.frombuffer(self.prompt, dtype="<i4")


class CancelRequest(_Message, tag=2):
    """Forget a request: all its choices, waiting or running. Unknown ids are ignored."""

    request_id: str


class CancelChoice(_Message, tag=3):
    """End one choice (a stop string was seen by the text side). Unknown ids are ignored."""

    request_id: str
    choice: int


class StatsRequest(_Message, tag=4):
    """Ask for an `EngineStats` message."""


class FlushCache(_Message, tag=5):
    """Empty the prefix cache, unless requests run or wait; answered with `CacheFlushed`."""


class LoadAdapter(_Message, tag=30):
    """Read and check an adapter, keep it if there is room; answered with `AdapterLoaded`, in order."""

    directory: str
    is_pinned: bool = False


class UnloadAdapter(_Message, tag=31):
    """Throw an adapter out as soon as no request uses it. Unknown ones are ignored."""

    digest: str


class UnpinAdapter(_Message, tag=33):
    """An adapter may make room for others again. Unknown ones are ignored."""

    digest: str


class DumpState(_Message, tag=7):
    """Ask for a `StateDump` message."""


class Shutdown(_Message, tag=6):
    """Leave the engine loop; running requests are abandoned."""


class EmbedRequest(_Message, tag=40):
    """Texts, each to become one vector; answered with one `Embedded`.

    `token_ids` are those of all texts, one after the other, as little-endian int32 bytes; `lens` says
    how many each text has. With `runs_alone` no text of another request shares a batch with them.
    `second_starts`, for texts that are pairs: where in each the second one begins. All texts are
    computed with `adapter`, if there is one. Running slots are shared between clients, and it is
    called `trace_id`, as in `GenerateRequest`.
    """

    request_id: str
    token_ids: bytes
    lens: list[int]
    runs_alone: bool = False
    second_starts: list[int] = []
    adapter: AdapterRef | None = None
    client: str = ""
    weight: float = 1.0
    trace_id: str = ""

    @classmethod
    def of(
        cls,
        request_id: str,
        texts: Sequence[Sequence[int]],
        second_starts: Sequence[int] = (),
        adapter: AdapterRef | None = None,
        *,
        client: str = "",
        weight: float = 1.0,
        trace_id: str = "",
    ) -> EmbedRequest:
        """From the token ids of each text."""
        lens = [len(ids) for ids in texts]
        flat = np.fromiter(itertools.chain.from_iterable(texts), "<i4", sum(lens)).tobytes()
        return cls(
            request_id,
            flat,
            lens,
            second_starts=list(second_starts),
            adapter=adapter,
            client=client,
            weight=weight,
            trace_id=trace_id,
        )


ToEngine = (
    GenerateRequest
    | CancelRequest
    | CancelChoice
    | StatsRequest
    | FlushCache
    | DumpState
    | LoadAdapter
    | UnloadAdapter
    | UnpinAdapter
    | Shutdown
    | EmbedRequest
)

# --- engine to server ---------------------------------------------------------------------


class TokenLogprobs(_Message):
    """Natural-log probabilities at one position, best alternatives first."""

    token_logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


class Admitted(_Message, tag=10):
    """A choice holds a running slot. `seed` is the one in force (drawn when none was given); of a request
    to embed it says nothing."""

    request_id: str
    choice: int
    seed: int


class TokenChunk(_Message, tag=11):
    """New tokens of one choice. The last chunk of a choice has a `finish_reason`.

    `cached_tokens` is the number of prompt tokens taken from the prefix cache.
    `finish_reason` is "stop" (eos or stop token, then `stop_token_id` tells which) or "length".
    The stop token itself is included in `token_ids`. `prompt_logprobs` are those of the next prompt
    tokens, from the second on; they come in pieces before any token of choice 0, and with no other.
    """

    request_id: str
    choice: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    cached_tokens: int = 0
    finish_reason: str | None = None
    stop_token_id: int | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None


class Failed(_Message, tag=12):
    """A whole request ended in an error."""

    request_id: str
    kind: str
    message: str
    slug: str
    param: str | None = None
    retry_after_s: float = 1.0

    @classmethod
    def from_error(cls, request_id: str, error: errors.EngineError) -> Failed:
        return cls(
            request_id,
            type(error).__name__,
            error.message,
            error.slug,
            error.param,
            getattr(error, "retry_after_s", 1.0),
        )

    def to_error(self) -> errors.EngineError:
        kind = getattr(errors, self.kind, errors.InternalError)
        if kind is errors.Overloaded:
            return kind(self.message, slug=self.slug, retry_after_s=self.retry_after_s)
        return kind(self.message, slug=self.slug, param=self.param)


class Embedded(_Message, tag=41):
    """The vectors of a whole `EmbedRequest`, in its order, as little-endian float32 bytes."""

    request_id: str
    vectors: bytes

    def matrix(self, size: int) -> np.ndarray:
        """Float32 [texts, size], a read-only view."""
        return np.frombuffer(self.vectors, "<f4").reshape(-1, size)


class EmbeddingInfo(_Message):
    """How texts become vectors of `size` numbers; `max_len` is the longest text, in tokens.

    `scores_pairs`: each text is a pair, and its vector one number, which says how well they fit.
    `takes_adapters`: requests may name an adapter.
    """

    size: int
    max_len: int
    vocab_size: int
    pooling: str
    is_normalized: bool
    scores_pairs: bool = False
    takes_adapters: bool = False


class EngineReady(_Message, tag=13):
    """The model is loaded. Capacities are as resolved by the engine.

    `implementation` is "native", or "transformers" for a model whose modules are not ours. Where answers
    may depend on who shares their batch, `batch_reason` says why.
    """

    max_total_tokens: int
    max_running_requests: int
    block_size: int
    context_length: int
    dtype: str
    device: str
    cpu_isa: str
    num_threads: int
    max_queued_requests: int
    kv_cache_dtype: str | None = None
    """None without a KV cache."""

    embedding: EmbeddingInfo | None = None
    generates: bool = True
    takes_adapters: bool = True
    implementation: str = "native"
    is_batch_invariant: bool = True
    batch_reason: str = ""

    @property
    def num_places(self) -> int:
        """Most choices that run and wait together."""
        return self.max_running_requests + self.max_queued_requests


class EngineFailed(_Message, tag=14):
    """The engine cannot start; it exits after this message."""

    message: str
    slug: str


class EngineStats(_Message, tag=15):
    """A snapshot between two steps. Blocks: free + cached + in_use = total.

    `schedule_s`, `model_s` and `update_s` are the times spent in deciding what a step computes, in
    the runner, and in booking what came out, by the clock. `draft_tokens` were guessed and computed,
    `accepted_tokens` of them were right. `cpu_s` is the CPU time of the engine's process, `kernel_cpu_s`
    the part of it that native kernels took since it was ready.
    """

    num_running: int
    num_waiting: int
    num_blocks_total: int
    num_blocks_free: int
    num_blocks_cached: int
    num_blocks_in_use: int
    num_steps: int
    prompt_tokens_computed: int
    prompt_tokens_cached: int
    output_tokens: int
    num_preemptions: int
    tokens_evicted: int
    model_s: float
    num_adapters_loaded: int = 0
    num_adapters_in_use: int = 0
    num_adapter_evictions: int = 0
    schedule_s: float = 0.0
    update_s: float = 0.0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    cpu_s: float = 0.0
    kernel_cpu_s: float = 0.0
    num_compiling: int = 0
    """Of those that wait, requests whose constraint is being compiled."""


class Progress(_Message, tag=16):
    """A step of start-up, for the log and /health: what is being done and how far, 0 to 1."""

    stage: str
    fraction: float


class CacheFlushed(_Message, tag=17):
    """Answer to `FlushCache`: whether the cache was emptied."""

    was_idle: bool


class StateDump(_Message, tag=18):
    """What the engine is busy with, as a JSON object (`core.state_dump`)."""

    state: bytes


class AdapterLoaded(_Message, tag=32):
    """Answer to `LoadAdapter`: what was read, or why it cannot be used (`error` and its slug)."""

    directory: str
    digest: str = ""
    rank: int = 0
    error: str | None = None
    slug: str = ""


ToServer = (
    Admitted
    | TokenChunk
    | Failed
    | EngineReady
    | EngineFailed
    | EngineStats
    | Progress
    | CacheFlushed
    | StateDump
    | AdapterLoaded
    | Embedded
)
