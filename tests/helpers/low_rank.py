"""Adapters with known weights, for tests of what they add."""

from __future__ import annotations

import torch


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """On the CPU, whatever the default device is: the same numbers everywhere."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu")


def site_of(in_features: int, modules: list[tuple[int, int, int]], *, is_embedding: bool = False):
    """Modules are (first column, columns, rank); each gets a scale of its own."""
    with_scales = [(first, count, rank, 0.5 + i) for i, (first, count, rank) in enumerate(modules)]
    return in_features, is_embedding, with_scales


def make_adapter(ops, dtype: str, sites: list, seed: int):
    adapter = ops.LoraAdapter(dtype, sites)
    for number, (in_features, _, modules) in enumerate(sites):
        for index, (_, columns, rank, _) in enumerate(modules):
            own = 1000 * seed + 10 * number + index
            adapter.pack(
                number, index, normal(rank, in_features, seed=own), normal(columns, rank, seed=own + 5)
            )
    return adapter


def make_plan(ops, adapters: list, rows_of_each: list[list[int]]):
    ends = torch.tensor([0, *(len(rows) for rows in rows_of_each)]).cumsum(0).int()
    return ops.LoraPlan(adapters, ends, torch.tensor(sum(rows_of_each, []), dtype=torch.int32))
