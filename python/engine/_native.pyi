"""Types of the native module. Tensor arguments take any DLPack tensor and are borrowed for the call."""

from typing import Any

import numpy as np

Tensor = Any

# --- context --------------------------------------------------------------------------------

class ProgressBoard:
    """The supervisor's page, mapped until the process ends; core/step_board.py has its layout."""

    def __init__(self, fd: int) -> None: ...
    @property
    def num_ops(self) -> int: ...
    def note_faults(self) -> None:
        """Note deadly signals on the board, before older handlers. Once a process."""

class Recording:
    """Ops with the addresses of their arguments, which must outlive it; see cpp/cpu/recording.h."""

    def __init__(self) -> None: ...
    @property
    def num_ops(self) -> int: ...
    def replay(self) -> None:
        """Run them again, in order, on what their buffers hold now."""

class ExecutionContext:
    """Instruction set and threads of one engine. isa: "auto" or a name from available_isas().

    rounds_attention: over a bfloat16 cache, queries and weights of values are rounded to bfloat16.
    """

    def __init__(self, num_threads: int, isa: str = "auto", rounds_attention: bool = False) -> None: ...
    @property
    def rounds_attention(self) -> bool: ...
    def report_to(self, board: ProgressBoard) -> None:
        """Count ops on the board from now on."""

    def begin_recording(self, recording: Recording) -> None:
        """Keep the ops of linear layers, norms, attention and gates that are called from now on."""

    def end_recording(self) -> None: ...
    @property
    def kernel_seconds(self) -> tuple[float, float]:
        """Seconds in kernels so far: of their callers, by the clock, and CPU time of the pool's threads."""

    @property
    def isa(self) -> str: ...
    @property
    def num_threads(self) -> int: ...

def available_isas() -> list[str]:
    """Instruction sets that this build and this machine have, slowest first."""

def cuda_is_compiled() -> bool: ...
def num_cuda_devices() -> int: ...

# --- prefix cache ----------------------------------------------------------------------------
# Array arguments are contiguous one-dimensional int32 numpy arrays, never converted.

class BlockAllocator:
    """References to blocks, and the stack of free ones. A wrong call changes nothing."""

    def __init__(self, num_blocks: int) -> None: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def num_free(self) -> int: ...
    def try_allocate(self, count: int) -> np.ndarray | None:
        """int32 [count] with one reference each, or None when fewer are free."""

    def retain(self, block_ids: np.ndarray) -> None: ...
    def release(self, block_ids: np.ndarray) -> None: ...
    def ref_count(self, block_id: int) -> int: ...
    def check(self) -> None: ...

def find_repetition(token_ids: np.ndarray, num_wanted: int, most: int) -> tuple[int, int]:
    """(end, agreed): the last place before the end where its last `num_wanted` tokens (2 or more) stand,
    and how many before it are the same, at most `most`; (0, 0) for none."""

class RadixTree:
    """Token prefixes and their blocks; see cpp/cache/radix_tree.h. Node 0 is the empty path."""

    def __init__(self, allocator: BlockAllocator, block_size: int, hash_mask: int = 0xFFFFFFFF) -> None: ...
    def match(self, namespace: str, token_ids: np.ndarray) -> tuple[int, np.ndarray, int]:
        """(tokens matched, block ids of the path, node); counts as a use."""

    def match_length(self, namespace: str, token_ids: np.ndarray) -> int: ...
    def insert(
        self, namespace: str, token_ids: np.ndarray, block_ids: np.ndarray, held: int = 0
    ) -> tuple[int, np.ndarray, int]:
        """(node, the tree's block ids of the path, number of duplicates among the given)."""

    def lock(self, node: int) -> None: ...
    def unlock(self, node: int) -> None: ...
    def path_len(self, node: int) -> int:
        """Blocks of the path that ends at the node."""

    def evict(self, num_blocks: int) -> int: ...
    def clear(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def num_cached_blocks(self) -> int:
        """Blocks in the tree, locked or not."""

    @property
    def num_evictable_blocks(self) -> int: ...
    @property
    def num_nodes(self) -> int: ...
    @property
    def num_namespaces(self) -> int: ...
    @property
    def stats(self) -> dict[str, int]: ...
    def check(self) -> None: ...

# --- normalisation -----------------------------------------------------------------------------

def rms_norm(ctx: ExecutionContext, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None: ...
def add_rms_norm(
    ctx: ExecutionContext, x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor
) -> None: ...
def layer_norm(
    ctx: ExecutionContext,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out: Tensor,
) -> None: ...
def pool(
    ctx: ExecutionContext, x: Tensor, cu_rows: Tensor, first_positions: Tensor, mode: str, out: Tensor
) -> None: ...

# --- sampling ------------------------------------------------------------------------------------

def sample(
    ctx: ExecutionContext,
    *,
    logits: Tensor,
    workspace: Tensor,
    seen: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    repetition_penalty: Tensor,
    frequency_penalty: Tensor,
    presence_penalty: Tensor,
    seeds: Tensor,
    choices: Tensor,
    positions: Tensor,
    token_ids: Tensor,
    token_indptr: Tensor,
    prompt_lens: Tensor,
    bias_ids: Tensor,
    bias_values: Tensor,
    bias_indptr: Tensor,
    bitmask: Tensor | None,
    num_top_logprobs: Tensor,
    out_ids: Tensor,
    out_logprobs: Tensor,
    top_ids: Tensor,
    top_logprobs: Tensor,
    reports_processed: bool,
    reports_logits: bool,
) -> None: ...
def score_tokens(
    ctx: ExecutionContext,
    logits: Tensor,
    token_ids: Tensor,
    num_top_logprobs: Tensor,
    out_logprobs: Tensor,
    top_ids: Tensor,
    top_logprobs: Tensor,
    reports_logits: bool,
) -> None: ...

# --- attention ---------------------------------------------------------------------------------

def rope(
    ctx: ExecutionContext, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor
) -> None: ...
def rope_append_kv(
    ctx: ExecutionContext,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_ids: Tensor,
    kv_scales: Tensor | None = None,
) -> None: ...
def append_kv(
    ctx: ExecutionContext,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_ids: Tensor,
    kv_scales: Tensor | None = None,
) -> None: ...
def paged_attention(
    ctx: ExecutionContext,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    window: int,
    softcap: float,
    is_causal: bool,
    out: Tensor,
    sinks: Tensor | None = None,
    kv_scales: Tensor | None = None,
) -> None: ...

# --- activations ---------------------------------------------------------------------------------

def silu_mul(ctx: ExecutionContext, gate_up: Tensor, out: Tensor) -> None: ...
def gelu_mul(ctx: ExecutionContext, gate_up: Tensor, out: Tensor) -> None: ...
def clamped_swiglu(
    ctx: ExecutionContext, gate_up: Tensor, alpha: float, limit: float, out: Tensor
) -> None: ...
def softcap(ctx: ExecutionContext, x: Tensor, cap: float) -> None: ...
def erf_gelu_mul(ctx: ExecutionContext, gate_up: Tensor, out: Tensor) -> None: ...
def activate(ctx: ExecutionContext, x: Tensor, activation: str, out: Tensor) -> None: ...

# --- linear layers -----------------------------------------------------------------------------

class PackedMatrix:
    """Weights [out_features, in_features] in the layout of the CPU kernels.

    dtype: "bfloat16", "float32", "bf16_dot" (stored as bfloat16), "int8", "int4" or "int4_affine".
    `group_len` (32 or 128; 0: 128 for int8, 32 for int4) k of a row share a scale. The memory is taken at
    once, in huge pages where the system allows; it is written by pack_rows.
    """

    def __init__(self, out_features: int, in_features: int, dtype: str, group_len: int = 0) -> None: ...
    def balance_columns(self, ctx: ExecutionContext, parts: list[Tensor]) -> None:
        """Scale columns that are far larger than the others, so that they do not take their groups'
        precision. Quantised formats, before any row is packed; `parts` [n, in_features] are all its rows."""

    def pack_rows(self, ctx: ExecutionContext, row_start: int, weight: Tensor) -> None:
        """Store `weight` [n, in_features] (float32, bfloat16 or float16, any row stride) as the rows from
        `row_start` on, rounded to nearest. Rows may come in any order and may be packed again."""

    def pack_codes(
        self,
        ctx: ExecutionContext,
        row_start: int,
        codes: Tensor,
        scales: Tensor,
        offsets: Tensor | None = None,
    ) -> None:
        """Store rows that are quantized already, exactly: uint8 `codes` [n, in_features] of which 128 (int8)
        or 8 (int4) stands for 0, and `scales` [n, groups], float32 (int8) or float16 (int4). A weight of
        int4_affine is scale * code + offset, both float32."""

    column_order: list[int]
    """The input column of each packed one; empty where they are in order. Quantised formats."""
    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    def write_file(self, ctx: ExecutionContext, fd: int, offset: int) -> int:
        """The packed bytes, `num_bytes` of them; the column scales are not among them. Their sum of 64 bits:
        two that differ in one word of 8 bytes never have the same one."""

    def read_file(self, ctx: ExecutionContext, fd: int, offset: int) -> int:
        """What write_file wrote, by a matrix of the same size and format; all rows are then packed. The sum
        of what was read."""

    def map_file(self, fd: int, offset: int) -> None:
        """As read_file, but the bytes stay in the file and are paged in when they are used. `offset` is a
        multiple of the page size; the file must not change while the matrix lives."""

    def clear(self) -> None:
        """As it was made: no row is packed, and no column scaled or moved."""

    column_scales: list[float]
    """One for each column, or none; set before weights are used that were not packed here."""

    @property
    def group_len(self) -> int:
        """0 where weights are not quantised."""

    @property
    def num_bytes(self) -> int: ...
    @property
    def is_complete(self) -> bool:
        """Every row has been packed; the ops refuse a matrix of which that is not true."""

def linear(
    ctx: ExecutionContext, x: Tensor, weight: PackedMatrix, bias: Tensor | None, out: Tensor
) -> None: ...
def gated_linear(
    ctx: ExecutionContext, x: Tensor, weight: PackedMatrix, bias: Tensor | None, activation: str, out: Tensor
) -> None: ...
def gated_mlp(
    ctx: ExecutionContext,
    x: Tensor,
    gate_up: PackedMatrix,
    gate_up_bias: Tensor | None,
    activation: str,
    product: Tensor,
    down: PackedMatrix,
    down_bias: Tensor | None,
    out: Tensor,
) -> None: ...
def embedding(ctx: ExecutionContext, token_ids: Tensor, weight: PackedMatrix, out: Tensor) -> None: ...

# --- adapters --------------------------------------------------------------------------------

class LoraAdapter:
    """Weights of one adapter in "bfloat16" or "float32"; see cpp/cpu/lora_adapter.h.

    A site is (in_features, is_embedding, modules), a module (first column, columns, rank, scale).
    """

    def __init__(
        self, dtype: str, sites: list[tuple[int, bool, list[tuple[int, int, int, float]]]]
    ) -> None: ...
    def pack(self, site: int, module: int, a: Tensor, b: Tensor) -> None:
        """Store A [rank, K] and B [N, rank] of a module, once."""

    @property
    def num_sites(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def is_complete(self) -> bool: ...

class LoraPlan:
    """Which rows of a step have which adapter: row_ids[cu_rows[i] : cu_rows[i + 1]] have adapters[i]."""

    def __init__(self, adapters: list[LoraAdapter], cu_rows: Tensor, row_ids: Tensor) -> None: ...

def lora(
    ctx: ExecutionContext, x: Tensor, site: int, plan: LoraPlan, workspace: Tensor, out: Tensor
) -> None: ...
def lora_embedding(
    ctx: ExecutionContext, token_ids: Tensor, site: int, plan: LoraPlan, workspace: Tensor, out: Tensor
) -> None: ...
