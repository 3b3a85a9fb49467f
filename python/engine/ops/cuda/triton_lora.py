"""Kernels of adapters: every program takes some rows of one adapter, all adapters in one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from engine.ops.cuda.low_rank import (
    GROUP_FIELDS,
    ITEM_FIELDS,
    RANK_MULTIPLE,
    SITE_FIELDS,
    TILE_COLUMNS,
    TILE_FIELDS,
    TILE_ROWS,
)

if TYPE_CHECKING:
    from engine.ops.cuda.low_rank import LoraPlan

BLOCK_K = 128
LOOKED_UP_RANKS = 64


def shrink(x: torch.Tensor, site: int, plan: LoraPlan, workspace: torch.Tensor, rank: int) -> None:
    """workspace[i] = x[row_ids[i]] Aᵀ, float32, `rank` to a row."""
    in_features = x.shape[1]
    shrink_kernel[(plan.num_tiles, triton.cdiv(rank, RANK_MULTIPLE))](
        x,
        plan.groups,
        plan.tiles,
        plan.row_ids,
        workspace,
        site * SITE_FIELDS,
        x.stride(0),
        rank,
        IN_FEATURES=in_features,
        GROUP_FIELDS=GROUP_FIELDS,
        TILE_FIELDS=TILE_FIELDS,
        ROWS=TILE_ROWS,
        RANKS=RANK_MULTIPLE,
        BLOCK_K=BLOCK_K,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=4,
        num_stages=4,
        enable_fp_fusion=True,
    )


def look_up(token_ids: torch.Tensor, site: int, plan: LoraPlan, workspace: torch.Tensor, rank: int) -> None:
    """workspace[i] = column token_ids[row_ids[i]] of A, float32, `rank` to a row."""
    adapter = next(adapter for adapter in plan.adapters if adapter.site(site).modules)
    look_up_kernel[(plan.num_tiles, triton.cdiv(rank, LOOKED_UP_RANKS))](
        token_ids,
        plan.groups,
        plan.tiles,
        plan.row_ids,
        workspace,
        site * SITE_FIELDS,
        adapter.site(site).in_features,
        rank,
        DTYPE=_triton_dtype(adapter.weights.dtype),
        GROUP_FIELDS=GROUP_FIELDS,
        TILE_FIELDS=TILE_FIELDS,
        ROWS=TILE_ROWS,
        RANKS=LOOKED_UP_RANKS,
        enable_fp_fusion=True,
    )


def expand(
    site: int, plan: LoraPlan, workspace: torch.Tensor, rank: int, num_items: int, out: torch.Tensor
) -> None:
    """out[row_ids[i]] += scale workspace[i] Bᵀ."""
    dtype = plan.adapters[0].weights.dtype
    expand_kernel[(plan.num_tiles, num_items)](
        workspace,
        plan.groups,
        plan.tiles,
        plan.row_ids,
        out,
        site * SITE_FIELDS,
        out.stride(0),
        rank,
        DTYPE=_triton_dtype(dtype),
        GROUP_FIELDS=GROUP_FIELDS,
        TILE_FIELDS=TILE_FIELDS,
        ITEM_FIELDS=ITEM_FIELDS,
        ROWS=TILE_ROWS,
        COLUMNS=TILE_COLUMNS,
        RANKS=RANK_MULTIPLE,
        # Three products of TF32 have the bits of float32 where one side has few, as stored weights do.
        PRECISION="ieee" if dtype == torch.float32 else "tf32x3",
        num_warps=4,
        num_stages=2,
        enable_fp_fusion=True,
    )


def _triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]


@triton.jit
def _tile(tiles, groups, TILE_FIELDS: tl.constexpr, GROUP_FIELDS: tl.constexpr):
    """Of this program: first index into the plan's rows, how many, addresses of weights and table."""
    tile = tiles + tl.program_id(0) * TILE_FIELDS
    group = groups + tl.load(tile) * GROUP_FIELDS
    table = tl.load(group + 1).to(tl.pointer_type(tl.int64))
    return tl.load(tile + 1), tl.load(tile + 2), tl.load(group), table


@triton.jit(do_not_specialize=["site", "rank"])
def shrink_kernel(
    x,
    groups,
    tiles,
    row_ids,
    workspace,
    site,
    x_stride,
    rank,
    IN_FEATURES: tl.constexpr,
    GROUP_FIELDS: tl.constexpr,
    TILE_FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`site` is the start of the site's row in an adapter's table."""
    first, num_rows, address, table = _tile(tiles, groups, TILE_FIELDS, GROUP_FIELDS)
    num_ranks = tl.load(table + site + 1)
    first_rank = tl.program_id(1) * RANKS
    if first_rank >= num_ranks:
        return
    weights = tl.multiple_of(address.to(tl.pointer_type(x.dtype.element_ty)), 16)
    a = weights + tl.multiple_of(tl.load(table + site), 16)
    i = tl.arange(0, ROWS)
    ranks = first_rank + tl.arange(0, RANKS)
    k = tl.arange(0, BLOCK_K)
    rows = tl.load(row_ids + first + i, mask=i < num_rows, other=0)
    x_rows = x + (rows * x_stride)[:, None]
    a_rows = a + (ranks * IN_FEATURES).to(tl.int64)[:, None]
    sums = tl.zeros((ROWS, RANKS), tl.float32)
    for start in range(0, IN_FEATURES, BLOCK_K):
        is_k = (start + k < IN_FEATURES)[None, :]
        x_part = tl.load(x_rows + (start + k)[None, :], mask=(i < num_rows)[:, None] & is_k, other=0.0)
        a_part = tl.load(a_rows + (start + k)[None, :], mask=(ranks < num_ranks)[:, None] & is_k, other=0.0)
        sums = tl.dot(x_part, tl.trans(a_part), sums, input_precision=PRECISION)
    place = workspace + ((first + i) * rank)[:, None] + ranks[None, :]
    tl.store(place, sums, mask=(i < num_rows)[:, None] & (ranks < num_ranks)[None, :])


@triton.jit(do_not_specialize=["site", "num_ids", "rank"])
def look_up_kernel(
    token_ids,
    groups,
    tiles,
    row_ids,
    workspace,
    site,
    num_ids,
    rank,
    DTYPE: tl.constexpr,
    GROUP_FIELDS: tl.constexpr,
    TILE_FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
):
    first, num_rows, address, table = _tile(tiles, groups, TILE_FIELDS, GROUP_FIELDS)
    num_ranks = tl.load(table + site + 1)
    a = address.to(tl.pointer_type(DTYPE)) + tl.load(table + site)
    i = tl.arange(0, ROWS)
    ranks = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    rows = tl.load(row_ids + first + i, mask=i < num_rows, other=0)
    ids = tl.load(token_ids + rows, mask=i < num_rows, other=0).to(tl.int64)
    is_written = (i < num_rows)[:, None] & (ranks < num_ranks)[None, :]
    is_read = is_written & ((ids >= 0) & (ids < num_ids))[:, None]
    found = tl.load(a + (ids * num_ranks)[:, None] + ranks[None, :], mask=is_read, other=0.0)
    place = workspace + ((first + i) * rank)[:, None] + ranks[None, :]
    tl.store(place, found.to(tl.float32), mask=is_written)


@triton.jit(do_not_specialize=["site", "rank"])
def expand_kernel(
    workspace,
    groups,
    tiles,
    row_ids,
    out,
    site,
    out_stride,
    rank,
    DTYPE: tl.constexpr,
    GROUP_FIELDS: tl.constexpr,
    TILE_FIELDS: tl.constexpr,
    ITEM_FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first, num_rows, address, table = _tile(tiles, groups, TILE_FIELDS, GROUP_FIELDS)
    if tl.program_id(1) >= tl.load(table + site + 3):
        return
    item = table + tl.load(table + site + 2) + tl.program_id(1) * ITEM_FIELDS
    first_column, num_columns = tl.load(item), tl.load(item + 1)
    first_rank, num_ranks = tl.load(item + 3), tl.load(item + 4)
    scale = tl.load(item + 5).to(tl.int32).to(tl.float32, bitcast=True)
    weights = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
    b = weights + tl.multiple_of(tl.load(item + 2), 16)
    i = tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    r = tl.arange(0, RANKS)
    padded = (num_ranks + RANKS - 1) // RANKS * RANKS
    shrunk = workspace + ((first + i) * rank + first_rank)[:, None] + r[None, :]
    b_rows = b + (c * padded)[:, None] + r[None, :]
    is_row, is_column = i < num_rows, c < num_columns
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, num_ranks, RANKS):
        is_rank = (start + r < num_ranks)[None, :]
        s = tl.load(shrunk + start, mask=is_row[:, None] & is_rank, other=0.0) * scale
        b_part = tl.load(b_rows + start, mask=is_column[:, None], other=0.0)
        sums = tl.dot(s, tl.trans(b_part.to(tl.float32)), sums, input_precision=PRECISION)
    rows = tl.load(row_ids + first + i, mask=is_row, other=0)
    place = out + (rows * out_stride + first_column)[:, None] + c[None, :]
    is_place = is_row[:, None] & is_column[None, :]
    before = tl.load(place, mask=is_place, other=0.0)
    tl.store(place, (before.to(tl.float32) + sums).to(out.dtype.element_ty), mask=is_place)
