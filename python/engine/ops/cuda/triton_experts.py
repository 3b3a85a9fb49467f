"""Products with the matrices of many experts in one launch: which rows an expert has stays on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from engine.ops.cuda.triton_product import options_of, sum_products, tile_of

if TYPE_CHECKING:
    from engine.ops.cuda.context import ExecutionContext
    from engine.ops.cuda.mixture import ExpertMatrices

ADDED_COLUMNS = 1024


def multiply(
    ctx: ExecutionContext,
    x: torch.Tensor,
    matrices: ExpertMatrices,
    order: torch.Tensor,
    starts: torch.Tensor,
    num_chosen: int,
    out: torch.Tensor,
    *,
    gathers: bool,
) -> None:
    """Pair order[i], of a row and one of its experts, for i from starts[e] to starts[e + 1] with expert e.

    With `gathers` x has a row for each `num_chosen` pairs and out[i] is what comes of its pair; else x[i]
    belongs to the pair, whose result is out[order[i]].
    """
    num_pairs, num_experts, first = len(order), len(starts) - 1, matrices.first
    rows_of_expert = triton.cdiv(num_pairs, num_experts)
    tile = tile_of(ctx, rows_of_expert, first.dtype)
    num_blocks = min(num_pairs, triton.cdiv(num_pairs, tile.rows) + num_experts)  # each expert's last is cut
    experts_kernel[(num_blocks, triton.cdiv(first.out_features, tile.columns))](
        x,
        matrices.table,
        order,
        starts,
        out,
        first.out_features,
        x.stride(0),
        first.stored.stride(0),
        out.stride(0),
        NUM_EXPERTS=num_experts,
        PADDED_EXPERTS=triton.next_power_of_2(num_experts),
        CHOSEN=num_chosen if gathers else 0,
        STORED=tl.uint8 if first.is_coded else _DTYPES[first.stored.dtype],
        SCALES=tl.float16 if first.dtype == "int4" else tl.float32,
        HAS_BIAS=matrices.has_bias,
        HAS_COLUMN_SCALES=matrices.has_column_scales,
        **options_of(ctx, tile, rows_of_expert, first, x.dtype),
    )


def add_up(results: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
    """out[t] = sum of weights[t, r] * results[t * R + r], in float32 and in order of r, rounded once."""
    num_chosen = weights.shape[1]
    add_up_kernel[(len(out), triton.cdiv(out.shape[1], ADDED_COLUMNS))](
        results,
        weights,
        out,
        out.shape[1],
        out.stride(0),
        CHOSEN=num_chosen,
        COLUMNS=ADDED_COLUMNS,
        enable_fp_fusion=True,
    )


_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def experts_kernel(
    x,
    table,
    order,
    starts,
    out,
    num_columns,
    x_stride,
    stored_stride,
    out_stride,
    NUM_EXPERTS: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    CHOSEN: tl.constexpr,
    STORED: tl.constexpr,
    SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_COLUMN_SCALES: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP_LEN: tl.constexpr,
    GROUPS_OF_STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program has up to ROWS pairs of one expert. Each finds its own, from where those of experts begin."""
    e = tl.arange(0, PADDED_EXPERTS)
    begins = tl.load(starts + e, mask=e < NUM_EXPERTS, other=0)
    ends = tl.load(starts + e + 1, mask=e < NUM_EXPERTS, other=0)
    blocks = (ends - begins + ROWS - 1) // ROWS
    blocks_before = tl.cumsum(blocks, 0) - blocks
    work = tl.program_id(0)
    is_mine = (blocks_before <= work) & (work < blocks_before + blocks)
    if tl.sum(is_mine.to(tl.int32)) == 0:
        return
    expert = tl.sum(tl.where(is_mine, e, 0))
    end = tl.sum(tl.where(is_mine, ends, 0))
    place = tl.sum(tl.where(is_mine, begins + (work - blocks_before) * ROWS, 0)) + tl.arange(0, ROWS)
    is_row = place < end
    pair = tl.load(order + place, mask=is_row, other=0)
    if CHOSEN > 0:
        row, target = pair // CHOSEN, place
    else:
        row, target = place, pair

    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < num_columns
    fields = table + expert * 5
    stored = tl.multiple_of(tl.load(fields).to(tl.pointer_type(STORED)), 16)
    scales = tl.multiple_of(tl.load(fields + 1).to(tl.pointer_type(SCALES)), 16)
    offsets = tl.multiple_of(tl.load(fields + 2).to(tl.pointer_type(tl.float32)), 16)
    column_scales = None
    if HAS_COLUMN_SCALES:
        column_scales = tl.multiple_of(tl.load(fields + 4).to(tl.pointer_type(tl.float32)), 16)
    sums = sum_products(
        x + (row.to(tl.int64) * x_stride)[:, None],
        is_row,
        stored + (column.to(tl.int64) * stored_stride)[:, None],
        column,
        num_columns,
        scales,
        offsets,
        column_scales,
        K,
        FORMAT,
        GROUP_LEN,
        GROUPS_OF_STEP,
        ROWS,
        COLUMNS,
        PRECISION,
    )
    if HAS_BIAS:
        bias = tl.load(fields + 3).to(tl.pointer_type(tl.float32))
        sums += tl.load(bias + column, mask=is_column, other=0.0)[None, :]
    places = out + (target.to(tl.int64) * out_stride)[:, None] + column[None, :]
    tl.store(places, sums.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def add_up_kernel(
    results, weights, out, num_columns, out_stride, CHOSEN: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < num_columns
    sums = tl.zeros((COLUMNS,), tl.float32)
    for rank in range(CHOSEN):
        pair = row * CHOSEN + rank
        result = tl.load(results + pair * num_columns + column, mask=is_column, other=0.0)
        sums += result.to(tl.float32) * tl.load(weights + pair)
    tl.store(out + row * out_stride + column, sums.to(out.dtype.element_ty), mask=is_column)
