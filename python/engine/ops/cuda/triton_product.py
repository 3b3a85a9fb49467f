"""Products with weights of few bits, decoded in registers, and products whose bits no batch changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from engine.ops.cuda.tile import Tile, has_wide_products
from engine.ops.cuda.triton_codes import e4m3_to_float

if TYPE_CHECKING:
    from engine.ops.cuda.context import ExecutionContext
    from engine.ops.cuda.matrix import PackedMatrix

STEP_K = 128
"""Bytes of a row of codes, and k of a row of floats, that a step of a product's loop reads."""
FEW_ROWS = 64
"""Up to so many, a product takes as long as reading its weights: these come in long stretches."""

LOOKED_UP_K = 1024


def multiply(
    ctx: ExecutionContext, x: torch.Tensor, weight: PackedMatrix, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """out = x weightᵀ + bias, summed in float32 and rounded once.

    What is multiplied are the codes, which are exact in any float; each group's sum is then scaled in
    float32. Groups are added in order of k. With `ctx.is_deterministic` one tile serves any number of rows,
    so that a row's bits do not depend on the others.
    """
    num_rows = len(x)
    if num_rows == 0:
        return
    tile = tile_of(ctx, num_rows, weight.dtype)
    num_blocks = triton.cdiv(num_rows, tile.rows) * triton.cdiv(weight.out_features, tile.columns)
    product_kernel[(num_blocks,)](
        x,
        weight.stored,
        weight.scales,
        weight.offsets,
        bias,
        out,
        num_rows,
        weight.out_features,
        x.stride(0),
        weight.stored.stride(0),
        out.stride(0),
        **options_of(ctx, tile, num_rows, weight, x.dtype),
    )


def options_of(
    ctx: ExecutionContext, tile: Tile, num_rows: int, weight: PackedMatrix, dtype: torch.dtype
) -> dict[str, Any]:
    """What a kernel around `sum_products` is compiled with, for so many rows of `dtype`."""
    group_len = weight.group_len or STEP_K
    takes_whole_steps = num_rows <= FEW_ROWS or ctx.is_deterministic
    return {
        "K": weight.in_features,
        "FORMAT": weight.dtype if weight.is_coded else "float",
        "GROUP_LEN": group_len,
        "GROUPS_OF_STEP": STEP_K // group_len if takes_whole_steps else 1,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
    }


def look_up(token_ids: torch.Tensor, weight: PackedMatrix, out: torch.Tensor) -> None:
    """out[t] = weight[token_ids[t]]; zeros for an id outside [0, N)."""
    grid = len(token_ids), triton.cdiv(weight.in_features, LOOKED_UP_K)
    if len(token_ids) > 0:
        look_up_kernel[grid](
            token_ids,
            weight.stored,
            weight.scales,
            weight.offsets,
            out,
            weight.out_features,
            weight.stored.stride(0),
            out.stride(0),
            K=weight.in_features,
            FORMAT=weight.dtype,
            GROUP_LEN=weight.group_len or STEP_K,
            COLUMNS=LOOKED_UP_K,
            enable_fp_fusion=True,
        )


def tile_of(ctx: ExecutionContext, num_rows: int, dtype: str) -> Tile:
    """Few rows wait for the weights, so that many programs share these; many rows share each weight. Pairs of
    codes take more registers and shared memory (docs/gpu.md)."""
    if ctx.is_deterministic:
        return Tile(rows=64, columns=64, num_warps=4, num_stages=2)
    if num_rows <= 16:
        return Tile(rows=16, columns=32, num_warps=4, num_stages=5)
    if num_rows <= FEW_ROWS:
        return Tile(rows=64, columns=32, num_warps=4, num_stages=3 if has_wide_products(ctx.isa) else 2)
    if not has_wide_products(ctx.isa):
        return Tile(rows=64, columns=128, num_warps=8, num_stages=2)
    if dtype.startswith("int4"):
        return Tile(rows=128, columns=64, num_warps=8, num_stages=2)
    return Tile(rows=128, columns=128, num_warps=8, num_stages=3)


@triton.jit(do_not_specialize=["num_rows"])
def product_kernel(
    x,
    stored,
    scales,
    offsets,
    bias,
    out,
    num_rows,
    num_columns,
    x_stride,
    stored_stride,
    out_stride,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP_LEN: tl.constexpr,
    GROUPS_OF_STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block_row, block_column = _block(num_rows, num_columns, ROWS, COLUMNS)
    row = block_row * ROWS + tl.arange(0, ROWS)
    column = block_column * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = row < num_rows, column < num_columns
    sums = sum_products(
        x + (row.to(tl.int64) * x_stride)[:, None],
        is_row,
        stored + (column.to(tl.int64) * stored_stride)[:, None],
        column,
        num_columns,
        scales,
        offsets,
        None,
        K,
        FORMAT,
        GROUP_LEN,
        GROUPS_OF_STEP,
        ROWS,
        COLUMNS,
        PRECISION,
    )
    if bias is not None:
        sums += tl.load(bias + column, mask=is_column, other=0.0)[None, :]
    place = out + (row.to(tl.int64) * out_stride)[:, None] + column[None, :]
    tl.store(place, sums.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def sum_products(
    x_rows,
    is_row,
    stored_rows,
    column,
    num_columns,
    scales,
    offsets,
    column_scales,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP_LEN: tl.constexpr,
    GROUPS_OF_STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """float32 [ROWS, COLUMNS] of rows of activations and rows of weights, both of K, scaled.

    A byte of int4 codes holds one of an even group in its low bits and one of the next group above. What
    `column_scales` [K], if any, holds, powers of two, is multiplied into the activations.
    """
    IS_PAIRED: tl.constexpr = FORMAT == "int4" or FORMAT == "int4_affine"
    NIBBLES: tl.constexpr = 2 if IS_PAIRED else 1
    STEP: tl.constexpr = GROUP_LEN * GROUPS_OF_STEP * NIBBLES
    is_column = column < num_columns
    i = tl.arange(0, GROUP_LEN)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, K, STEP):
        for UNIT in tl.static_range(GROUPS_OF_STEP):
            first_k = start + UNIT * GROUP_LEN * NIBBLES
            place = stored_rows + (first_k // NIBBLES + i)[None, :]
            is_stored = is_column[:, None]
            if FORMAT == "float":
                is_stored &= (first_k + i < K)[None, :]
            loaded = tl.load(place, mask=is_stored, other=0)
            for NIBBLE in tl.static_range(NIBBLES):
                k = first_k + NIBBLE * GROUP_LEN + i
                is_x = is_row[:, None]
                if K % STEP != 0:
                    is_x &= (k < K)[None, :]
                x_part = tl.load(x_rows + k[None, :], mask=is_x, other=0.0)
                if column_scales is not None:
                    factor = tl.load(column_scales + k, mask=k < K, other=0.0)
                    x_part = (x_part.to(tl.float32) * factor[None, :]).to(x_part.dtype)
                weights = _decode(loaded, NIBBLE, FORMAT).to(x_part.dtype)
                if FORMAT == "float" or FORMAT == "fp8":
                    sums = tl.dot(x_part, tl.trans(weights), sums, input_precision=PRECISION)
                else:
                    group = (first_k // GROUP_LEN + NIBBLE) * num_columns + column
                    scale = tl.load(scales + group, mask=is_column, other=0.0).to(tl.float32)
                    part = tl.dot(x_part, tl.trans(weights), input_precision=PRECISION)
                    sums += part * scale[None, :]
                    if FORMAT == "int4_affine":
                        offset = tl.load(offsets + group, mask=is_column, other=0.0)
                        sums += tl.sum(x_part.to(tl.float32), 1)[:, None] * offset[None, :]
    if FORMAT == "fp8":
        sums *= tl.load(scales + column, mask=is_column, other=0.0)[None, :]
    return sums


@triton.jit
def _block(num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row and column of this program's block. Eight rows of blocks go along the columns together, so that
    what they read of both sides stays in the cache."""
    num_block_rows = tl.cdiv(num_rows, ROWS)
    num_block_columns = tl.cdiv(num_columns, COLUMNS)
    band = tl.program_id(0) // (8 * num_block_columns) * 8
    height = tl.minimum(num_block_rows - band, 8)
    within = tl.program_id(0) % (8 * num_block_columns)
    return band + within % height, within // height


@triton.jit
def _decode(loaded, NIBBLE: tl.constexpr, FORMAT: tl.constexpr):
    """The numbers, before they are scaled."""
    if FORMAT == "float":
        return loaded
    elif FORMAT == "fp8":
        return e4m3_to_float(loaded)
    elif FORMAT == "int8":
        return loaded.to(tl.float32) - 128.0
    elif FORMAT == "int4":
        return ((loaded >> (4 * NIBBLE)) & 15).to(tl.float32) - 8.0
    else:
        return ((loaded >> (4 * NIBBLE)) & 15).to(tl.float32)


@triton.jit
def look_up_kernel(
    token_ids,
    stored,
    scales,
    offsets,
    out,
    num_ids,
    stored_stride,
    out_stride,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP_LEN: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.load(token_ids + token + 0 * k).to(tl.int64)  # the same for all
    is_read = (k < K) & (row >= 0) & (row < num_ids)
    group = k // GROUP_LEN
    if FORMAT == "int4" or FORMAT == "int4_affine":
        loaded = tl.load(
            stored + row * stored_stride + group // 2 * GROUP_LEN + k % GROUP_LEN, mask=is_read, other=0
        )
        low, high = _decode(loaded, 0, FORMAT), _decode(loaded, 1, FORMAT)
        numbers = tl.where(group % 2 == 0, low, high)
    else:
        loaded = tl.load(stored + row * stored_stride + k, mask=is_read, other=0)
        numbers = _decode(loaded, 0, FORMAT)
    if FORMAT == "fp8":
        numbers *= tl.load(scales + row, mask=is_read, other=0.0)
    else:
        numbers *= tl.load(scales + group * num_ids + row, mask=is_read, other=0.0).to(tl.float32)
    if FORMAT == "int4_affine":
        numbers += tl.load(offsets + group * num_ids + row, mask=is_read, other=0.0)
    numbers = tl.where(is_read, numbers, 0.0)
    tl.store(out + token.to(tl.int64) * out_stride + k, numbers.to(out.dtype.element_ty), mask=k < K)
