"""Attention of several queries a sequence over the paged cache, on tensor cores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from engine.ops.cuda.plan import TILE_ROWS, DevicePlan
from engine.ops.cuda.tile import Tile, has_wide_products
from engine.ops.cuda.triton_codes import e4m3_to_float

if TYPE_CHECKING:
    from engine.ops.cuda.context import ExecutionContext

NO_WINDOW = 2**30
_LOG2_E = tl.constexpr(1.4426950408889634)
_VALUE_FACTOR = tl.constexpr(
    2.0**-8
)  # codes reach 448: without it, weights times scales leave float16's range


def prefill_attention(
    ctx: ExecutionContext,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: DevicePlan,
    scale: float,
    window: int,
    softcap: float,
    out: torch.Tensor,
    sinks: torch.Tensor | None = None,
    kv_scales: torch.Tensor | None = None,
) -> None:
    """`paged_attention` for the rows of `plan.tiles`, and for those of `plan.decode_rows`, too, where
    `ctx.is_deterministic`; the others are left as they are.

    The heads of a group are rows of one tile, so that each key and value is read once for all of them. Keys
    are visited in blocks that start at multiples of a fixed length, counted from the sequence's start. Blocks
    that some rows of a tile see in part are another loop; where `ctx.is_deterministic` the compiler may not
    fuse operations in one and not in the other, so that a row's bits do not depend on its tile or chunk.

    Shapes: `q`, `out` bfloat16, float16 or float32 [T, H, D], heads contiguous; `k_cache`, `v_cache`
    [N, G, S, D], of the dtype of `q`, or float8_e4m3fn with `kv_scales` float32 [N, G, 2, S]; `sinks` float32
    [H]; D a multiple of 16 up to 256; H / G at most 64. Blocks are contiguous.
    Source: Dao et al. 2022 (online softmax over tiles); Kwon et al. 2023 (block tables); Xiao et al. 2023
    (sinks).
    """
    _, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = v_cache.shape
    group = num_heads // num_kv_heads
    tile = tile_of(ctx.isa, head_dim, k_cache.dtype)
    if kv_scales is not None:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    work = [(plan.tiles, TILE_ROWS)]
    if ctx.is_deterministic:
        work.append((plan.decode_rows[:, None], 1))
    for tiles, queries_of_tile in work:
        num_programs = len(tiles) * triton.cdiv(queries_of_tile, tile.rows // group) * num_kv_heads
        if num_programs == 0:
            continue
        prefill_kernel[(num_programs,)](
            q,
            k_cache,
            v_cache,
            kv_scales,
            sinks,
            out,
            tiles,
            plan.cu_seqlens_q,
            plan.kv_lens,
            plan.block_tables,
            scale,
            softcap,
            min(window, NO_WINDOW),
            q.stride(0),
            out.stride(0),
            k_cache.stride(0),
            v_cache.stride(0),
            plan.block_tables.stride(0),
            NUM_KV_HEADS=num_kv_heads,
            GROUP=group,
            HEAD_DIM=head_dim,
            PADDED_DIM=triton.next_power_of_2(head_dim),
            BLOCK_SIZE=block_size,
            TILE_FIELDS=tiles.shape[1],
            QUERIES_OF_TILE=queries_of_tile,
            ROWS=tile.rows,
            KEYS=tile.columns,
            IS_CAUSAL=plan.is_causal,
            HAS_WINDOW=window > 0 and (ctx.is_deterministic or window < plan.max_kv_len),
            HAS_SOFTCAP=softcap > 0,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=not ctx.is_deterministic,
        )


def tile_of(isa: str, head_dim: int, dtype: torch.dtype) -> Tile:
    """Rows of queries and keys of a block, of a cache of `dtype`. They follow from the model and the GPU
    alone, and are the largest whose sums fit the registers (docs/gpu.md)."""
    is_small = head_dim <= 128
    if dtype == torch.float32:
        return Tile(rows=64, columns=32, num_warps=8, num_stages=1)
    if has_wide_products(isa):
        return Tile(rows=128, columns=64, num_warps=8, num_stages=3 if is_small else 2)
    if is_small and dtype in (torch.bfloat16, torch.float16):
        return Tile(rows=128, columns=64, num_warps=8, num_stages=2)
    return Tile(rows=64, columns=32, num_warps=4 if is_small else 8, num_stages=2)


@triton.jit(do_not_specialize=["window", "table_stride"])
def prefill_kernel(
    q,
    k_cache,
    v_cache,
    kv_scales,
    sinks,
    out,
    tiles,
    cu_seqlens_q,
    kv_lens,
    block_tables,
    scale,
    softcap,
    window,
    q_stride,
    out_stride,
    k_block_stride,
    v_block_stride,
    table_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_FIELDS: tl.constexpr,
    QUERIES_OF_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program has `ROWS // GROUP` queries of a tile and the heads of one KV head. The last tiles, whose
    queries see the most keys, start first, so that short work fills the end."""
    QUERIES: tl.constexpr = ROWS // GROUP
    BLOCKS_OF_TILE: tl.constexpr = (QUERIES_OF_TILE + QUERIES - 1) // QUERIES
    work = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = work % NUM_KV_HEADS
    block_of_tile = work // NUM_KV_HEADS % BLOCKS_OF_TILE
    tile = tiles + work // (NUM_KV_HEADS * BLOCKS_OF_TILE) * TILE_FIELDS
    sequence = tl.load(tile)
    first_row = tl.load(cu_seqlens_q + sequence)
    num_rows = tl.load(cu_seqlens_q + sequence + 1) - first_row
    first_query = block_of_tile * QUERIES
    if TILE_FIELDS == 2:
        first_query += tl.load(tile + 1)
    rows_left = tl.minimum(num_rows - first_query, QUERIES_OF_TILE - block_of_tile * QUERIES)
    num_queries = tl.minimum(rows_left, QUERIES)
    if num_queries <= 0:
        return
    kv_len = tl.load(kv_lens + sequence)

    r = tl.arange(0, ROWS)
    head = kv_head * GROUP + r % GROUP
    is_row = r // GROUP < num_queries
    d = tl.arange(0, PADDED_DIM)
    row = (first_row + first_query + r // GROUP).to(tl.int64)
    elements = (head * HEAD_DIM)[:, None] + d[None, :]
    is_element = is_row[:, None] & (d < HEAD_DIM)[None, :]
    queries = tl.load(q + (row * q_stride)[:, None] + elements, mask=is_element, other=0.0)

    # Keys in [begin, open_end) are seen by every row, of those in [open_end, end) each row sees some.
    first_position = kv_len - num_rows + first_query
    position = first_position + r // GROUP
    begin = kv_len * 0
    end = kv_len
    open_end = kv_len // KEYS * KEYS
    if IS_CAUSAL:
        end = first_position + num_queries
        open_end = (first_position + 1) // KEYS * KEYS
    if HAS_WINDOW:
        begin = tl.maximum(first_position - window + 1, 0) // KEYS * KEYS
        open_end = begin
        if not IS_CAUSAL:
            end = tl.minimum(kv_len, first_position + num_queries - 1 + window)

    if sinks is not None:
        largest = tl.load(sinks + head, mask=is_row, other=0.0) * _LOG2_E
        total = tl.full((ROWS,), 1.0, tl.float32)
    else:
        largest = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, PADDED_DIM), tl.float32)
    head_start = kv_head * BLOCK_SIZE * HEAD_DIM
    for IS_MASKED in tl.static_range(2):
        if IS_MASKED:
            first_key, last_key = open_end, end
        else:
            first_key, last_key = begin, open_end
        for start in range(first_key, last_key, KEYS):
            key = start + tl.arange(0, KEYS)
            is_key = (key < end) if IS_MASKED else (key >= 0)
            table = block_tables + sequence.to(tl.int64) * table_stride + key // BLOCK_SIZE
            block = tl.load(table, mask=is_key, other=0).to(tl.int64)
            within = (head_start + key % BLOCK_SIZE * HEAD_DIM)[:, None] + d[None, :]
            is_loaded = is_key[:, None] & (d < HEAD_DIM)[None, :]
            k_place = k_cache + (block * k_block_stride)[:, None] + within
            v_place = v_cache + (block * v_block_stride)[:, None] + within
            keys = tl.load(k_place, mask=is_loaded, other=0)
            values = tl.load(v_place, mask=is_loaded, other=0)
            if kv_scales is not None:
                keys = e4m3_to_float(keys).to(queries.dtype)
                values = e4m3_to_float(values, _VALUE_FACTOR).to(queries.dtype)
                scale_place = kv_scales + (block * NUM_KV_HEADS + kv_head) * (2 * BLOCK_SIZE)
                scale_place += key % BLOCK_SIZE
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
            if kv_scales is not None:
                scores *= tl.load(scale_place, mask=is_key, other=0.0)[None, :]
            if HAS_SOFTCAP:
                scores = softcap * (1 - 2 / (tl.exp2(scores * (2 * _LOG2_E / softcap)) + 1))
            scores *= _LOG2_E
            if IS_MASKED:
                if IS_CAUSAL:
                    is_seen = key[None, :] <= position[:, None]
                else:
                    is_seen = is_key[None, :] & (r >= 0)[:, None]
                if HAS_WINDOW:
                    is_seen &= key[None, :] > position[:, None] - window
                    if not IS_CAUSAL:
                        is_seen &= key[None, :] < position[:, None] + window
                scores = tl.where(is_seen, scores, float("-inf"))
            raised = tl.maximum(largest, tl.max(scores, 1))
            base = tl.where(raised == float("-inf"), 0.0, raised)  # a row that has seen nothing yet
            weights = tl.exp2(scores - base[:, None])
            kept = tl.exp2(largest - base)
            total = total * kept + tl.sum(weights, 1)
            largest = raised
            if kv_scales is not None:
                value_scale = tl.load(scale_place + BLOCK_SIZE, mask=is_key, other=0.0)
                weights *= (value_scale / _VALUE_FACTOR)[None, :]
            sums *= kept[:, None]
            sums = tl.dot(weights.to(values.dtype), values, sums, input_precision=PRECISION)

    attended = sums / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(out + (row * out_stride)[:, None] + elements, attended.to(out.dtype.element_ty), mask=is_element)
