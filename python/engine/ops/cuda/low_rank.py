"""What adapters add to linear layers and to the embedding, each row with its own adapter."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.errors import NativeError
from engine.ops.transfer import send

if TYPE_CHECKING:
    from engine.ops.cuda.context import ExecutionContext

TILE_ROWS = 32
"""Rows of one adapter that a program takes, whatever their number: a row's bits do not depend on it."""

TILE_COLUMNS = 128
RANK_MULTIPLE = 16
"""To which ranks are filled up in B: what a tensor core sums at once."""

MOST_FEATURES, MOST_RANK = 1 << 24, 4096
SITE_FIELDS, ITEM_FIELDS, GROUP_FIELDS, TILE_FIELDS = 4, 6, 2, 3

Module = tuple[int, int, int, float]


@dataclasses.dataclass(slots=True)
class _Site:
    """Where a layer's weights lie, in elements of the buffer; A of all modules one under the other."""

    in_features: int
    is_embedding: bool
    modules: Sequence[Module]
    a_offset: int
    b_offsets: list[int]
    num_items: int
    is_packed: list[bool]

    @property
    def rank(self) -> int:
        return sum(rank for _, _, rank, _ in self.modules)

    @property
    def num_columns(self) -> int:
        return max((first + count for first, count, _, _ in self.modules), default=0)


class LoraAdapter:
    """Weights of one adapter in "bfloat16", "float16" or "float32", on the device that is the default one.

    A site is (in_features, is_embedding, modules), a module (first column, columns, rank, scale).
    One buffer holds all weights: of a site A [ranks of its modules, K], of an embedding [V, ranks]; then B of
    each module [N, rank], ranks filled up with zeros. `table` int64 tells the kernels where: a row of
    SITE_FIELDS for each site (start of A, ranks, first item, items), then a row of ITEM_FIELDS for each item
    of work, up to TILE_COLUMNS columns of a module (first column, columns, start in B, first rank, rank, the
    scale's bits).
    """

    def __init__(self, dtype: str, sites: Sequence[tuple[int, bool, Sequence[Module]]]) -> None:
        if dtype not in ("bfloat16", "float16", "float32"):
            raise NativeError(f"dtype: expected bfloat16, float16 or float32, got {dtype!r}")
        self._sites: list[_Site] = []
        end = 0
        for in_features, is_embedding, modules in sites:
            _check_range(in_features, 1, MOST_FEATURES, "in_features")
            _check_modules(modules)
            a_offset = end
            end += _aligned(in_features * sum(rank for _, _, rank, _ in modules))
            b_offsets = []
            for _, num_columns, rank, _ in modules:
                b_offsets.append(end)
                end += num_columns * _padded(rank)
            num_items = sum(-(-count // TILE_COLUMNS) for _, count, _, _ in modules)
            is_packed = [False] * len(modules)
            self._sites.append(
                _Site(in_features, is_embedding, modules, a_offset, b_offsets, num_items, is_packed)
            )
        self.weights = torch.zeros(max(end, 1), dtype=getattr(torch, dtype))
        self.table = torch.from_numpy(_table(self._sites)).to(self.weights.device)

    def pack(self, site: int, module: int, a: torch.Tensor, b: torch.Tensor) -> None:
        """Store A [rank, K] and B [N, rank] of a module, once, rounded to nearest even."""
        _check_range(site, 0, self.num_sites - 1, "site")
        place = self._sites[site]
        _check_range(module, 0, len(place.modules) - 1, "module")
        _, num_columns, rank, _ = place.modules[module]
        _check_shape(a, "a", (rank, place.in_features))
        _check_shape(b, "b", (num_columns, rank))
        if place.is_packed[module]:
            raise NativeError("module: packed already")
        first_rank = sum(rank for _, _, rank, _ in place.modules[:module])
        ranks = slice(first_rank, first_rank + rank)
        size, columns = place.in_features * place.rank, num_columns * _padded(rank)
        all_a = self.weights[place.a_offset : place.a_offset + size]
        if place.is_embedding:
            all_a.view(place.in_features, place.rank)[:, ranks] = a.T.to(self.weights)
        else:
            all_a.view(place.rank, place.in_features)[ranks] = a.to(self.weights)
        start = place.b_offsets[module]
        self.weights[start : start + columns].view(num_columns, -1)[:, :rank] = b.to(self.weights)
        place.is_packed[module] = True

    def site(self, index: int) -> _Site:
        return self._sites[index]

    @property
    def num_sites(self) -> int:
        return len(self._sites)

    @property
    def num_bytes(self) -> int:
        return self.weights.nbytes + self.table.nbytes

    @property
    def is_complete(self) -> bool:
        return all(is_packed for site in self._sites for is_packed in site.is_packed)


class LoraPlan:
    """Which rows of a step have which adapter: row_ids[cu_rows[i] : cu_rows[i + 1]] have adapters[i].

    Shapes: `cu_rows` int32 [G + 1] and `row_ids` int32 [R] on the host. `groups`, `tiles` and `row_ids` are
    int64 on the device, copied at once: for each adapter the addresses of its weights and
    its table; for each tile of up to TILE_ROWS rows its group, its first index into `row_ids`, and its rows.
    """

    def __init__(self, adapters: Sequence[LoraAdapter], cu_rows: torch.Tensor, row_ids: torch.Tensor) -> None:
        ends, rows = cu_rows.numpy().astype(np.int64), row_ids.numpy().astype(np.int64)
        _check_rows(adapters, ends, rows)
        self.adapters = adapters
        self.num_rows, self.row_end = len(rows), int(rows.max(initial=-1)) + 1
        tiles = [
            (group, first, min(TILE_ROWS, end - first))
            for group, (start, end) in enumerate(itertools.pairwise(ends.tolist()))
            for first in range(start, end, TILE_ROWS)
        ]
        self.num_tiles = len(tiles)
        if not tiles:
            return
        groups = [(adapter.weights.data_ptr(), adapter.table.data_ptr()) for adapter in adapters]
        parts = [np.array(groups, np.int64).ravel(), np.array(tiles, np.int64).ravel(), rows]
        # Aligned, whatever the counts: else there would be kernels for each alignment.
        self.groups, self.tiles, self.row_ids = send(parts, adapters[0].weights.device)


def lora(
    ctx: ExecutionContext,
    x: torch.Tensor,
    site: int,
    plan: LoraPlan,
    workspace: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """out[t] += scale (x[t] Aᵀ) Bᵀ for the rows of the plan, with what the row's adapter has at `site`.

    Sums are taken in float32 and rounded once, with what `out` held before. The bits of a row depend on
    nothing but the row, its adapter and that.

    Shapes: x [T, K] of the adapters' dtype; out [T, N] of any; both with any row stride; workspace float32
    [W], W at least the plan's rows times the largest sum of ranks that an adapter has at the site.
    Source: Hu et al. 2021; Chen et al. 2023 (one launch for many adapters).
    """
    shape = _shape_of_call(plan, site, workspace, out, x, is_embedding=False)
    if shape is None:
        return
    from engine.ops.cuda import triton_lora  # Triton only where there is a GPU

    triton_lora.shrink(x, site, plan, workspace, shape.rank)
    triton_lora.expand(site, plan, workspace, shape.rank, shape.num_items, out)


def lora_embedding(
    ctx: ExecutionContext,
    token_ids: torch.Tensor,
    site: int,
    plan: LoraPlan,
    workspace: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """The same at an embedding: instead of x[t] Aᵀ, column token_ids[t] of A.

    Shapes: token_ids int32 [T]; the others as for `lora`. An id that the embedding does not have adds
    nothing: finding it would wait for the device.
    """
    shape = _shape_of_call(plan, site, workspace, out, None, is_embedding=True)
    if shape is None:
        return
    from engine.ops.cuda import triton_lora

    triton_lora.look_up(token_ids, site, plan, workspace, shape.rank)
    triton_lora.expand(site, plan, workspace, shape.rank, shape.num_items, out)


@dataclasses.dataclass(frozen=True, slots=True)
class _Shape:
    """The largest of the adapters of a call: what grids are made for."""

    rank: int
    num_items: int


def _shape_of_call(
    plan: LoraPlan,
    site: int,
    workspace: torch.Tensor,
    out: torch.Tensor,
    x: torch.Tensor | None,
    *,
    is_embedding: bool,
) -> _Shape | None:
    """None where no adapter has anything to add. Raises: `NativeError` for what does not fit."""
    if plan.row_end > len(out):
        raise NativeError(f"plan: has row {plan.row_end - 1}, but out has {len(out)} rows")
    rank = num_items = 0
    for adapter in plan.adapters:
        _check_range(site, 0, adapter.num_sites - 1, "site")
        place = adapter.site(site)
        if not place.modules:
            continue
        if place.is_embedding != is_embedding:
            raise NativeError("site: an embedding is looked up, other layers are multiplied")
        if x is not None:
            _check_shape(x, "x", (len(x), place.in_features))
            if x.dtype != adapter.weights.dtype:
                raise NativeError(f"x: expected the adapters' {adapter.weights.dtype}, got {x.dtype}")
        if place.num_columns > out.shape[1]:
            raise NativeError(f"out: expected at least {place.num_columns} columns, got {out.shape[1]}")
        rank, num_items = max(rank, place.rank), max(num_items, place.num_items)
    if plan.num_rows * rank > len(workspace):
        raise NativeError(
            f"workspace: expected at least {plan.num_rows * rank} elements, got {len(workspace)}"
        )
    return _Shape(rank, num_items) if rank and plan.num_tiles else None


def _table(sites: Sequence[_Site]) -> np.ndarray:
    """int64, as the kernels read it: all sites, then all items."""
    rows, items = [], []
    for site in sites:
        first_item = SITE_FIELDS * len(sites) + ITEM_FIELDS * len(items)
        rows.append((site.a_offset, site.rank, first_item, site.num_items))
        first_rank = 0
        for (first, count, rank, scale), offset in zip(site.modules, site.b_offsets, strict=True):
            bits = int(np.float32(scale).view(np.int32))
            items += [
                (
                    first + column,
                    min(TILE_COLUMNS, count - column),
                    offset + column * _padded(rank),
                    first_rank,
                    rank,
                    bits,
                )
                for column in range(0, count, TILE_COLUMNS)
            ]
            first_rank += rank
    flat = [*itertools.chain.from_iterable(rows), *itertools.chain.from_iterable(items)]
    return np.array(flat, np.int64)


def _padded(rank: int) -> int:
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE


def _aligned(num_elements: int) -> int:
    """So that what follows can be read 16 bytes at a time."""
    return -(-num_elements // 16) * 16


def _check_range(value: int, least: int, most: int, name: str) -> None:
    if not least <= value <= most:
        raise NativeError(f"{name}: expected {least} to {most}, got {value}")


def _check_modules(modules: Sequence[Module]) -> None:
    next_column = 0  # programs write the columns of different modules at the same time
    for first_column, num_columns, rank, _ in modules:
        _check_range(rank, 1, MOST_RANK, "rank")
        _check_range(num_columns, 1, MOST_FEATURES, "num_columns")
        _check_range(first_column, next_column, MOST_FEATURES, "first_column")
        next_column = first_column + num_columns


def _check_shape(tensor: torch.Tensor, name: str, shape: tuple[int, int]) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise NativeError(
            f"{name}: expected float32, bfloat16 or float16 {list(shape)}, "
            f"got {tensor.dtype} {list(tensor.shape)}"
        )


def _check_rows(adapters: Sequence[LoraAdapter], ends: np.ndarray, rows: np.ndarray) -> None:
    is_cut = len(ends) == len(adapters) + 1 and ends[0] == 0 and ends[-1] == len(rows)
    if not is_cut or (np.diff(ends) < 0).any():
        raise NativeError(f"cu_rows: expected {len(adapters) + 1} ascending numbers from 0 to {len(rows)}")
    if not all(adapter.is_complete for adapter in adapters):
        raise NativeError("adapters: not all modules have been packed")
    if (rows < 0).any():
        raise NativeError("row_ids: expected no negative row")
    if len(np.unique(rows)) != len(rows):
        raise NativeError("row_ids: expected each row once")
