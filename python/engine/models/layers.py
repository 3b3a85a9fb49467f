"""Weights of linear layers and norms, each knowing which checkpoint tensors fill it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch

from engine.models.lora_sites import Site
from engine.models.weights import Slot

NamedSlots = Iterator[tuple[str, Slot]]


class FusedLinear:
    """Projections of one input packed one under the other, so that one product serves them all.

    `parts` are (checkpoint name without ".weight", rows) in order. The bias is float32. int8 weights wait
    until all parts are there: how columns are scaled follows from the whole matrix.
    """

    def __init__(
        self,
        ops: ModuleType,
        ctx: Any,
        parts: Sequence[tuple[str, int]],
        in_features: int,
        dtype: str,
        *,
        has_bias: bool = False,
    ) -> None:
        self.out_features = sum(rows for _, rows in parts)
        self.weight = ops.PackedMatrix(self.out_features, in_features, dtype)
        self.bias = torch.zeros(self.out_features) if has_bias else None
        self._ctx = ctx
        self._parts = parts
        self.in_features = in_features
        self.site = -1
        """Its number for adapters; given by the model that they are for."""
        self._is_balanced = dtype == "int8"
        self._waiting: dict[int, torch.Tensor] = {}

    def slots(self) -> NamedSlots:
        start = 0
        for name, rows in self._parts:
            store = functools.partial(self._store, start)
            yield f"{name}.weight", Slot((rows, self.in_features), store, matrix=self.weight)
            if self.bias is not None:
                yield f"{name}.bias", Slot((rows,), self.bias[start : start + rows].copy_, dummy="zeros")
            start += rows

    @property
    def lora_site(self) -> Site:
        return Site.of(self.in_features, self._parts)

    def _store(self, start: int, weight: torch.Tensor) -> None:
        if not self._is_balanced:
            self.weight.pack_rows(self._ctx, start, weight)
            return
        self._waiting[start] = weight
        if len(self._waiting) == len(self._parts):
            parts = [part for _, part in sorted(self._waiting.items())]
            self._waiting.clear()
            self.fill(parts)

    def fill(self, parts: Sequence[torch.Tensor]) -> None:
        """Store the whole matrix, given in pieces of rows."""
        if self._is_balanced:
            self.weight.balance_columns(self._ctx, list(parts))
        first_row = 0
        for part in parts:
            self.weight.pack_rows(self._ctx, first_row, part)
            first_row += len(part)


class Norm:
    """Weight of a root-mean-square normalisation, float32 whatever the checkpoint holds.

    `offset` is added to what the checkpoint holds.
    """

    def __init__(self, name: str, size: int, offset: float = 0.0) -> None:
        self.weight = torch.ones(size)
        self._name, self._offset = name, offset

    def slots(self) -> NamedSlots:
        yield f"{self._name}.weight", Slot(tuple(self.weight.shape), self._store, dummy="ones")

    def _store(self, weight: torch.Tensor) -> None:
        self.weight.copy_(weight).add_(self._offset)


class Sinks:
    """Learned scores of attention, one a query head, float32."""

    def __init__(self, name: str, num_heads: int) -> None:
        self.scores = torch.zeros(num_heads)
        self._name = name

    def slots(self) -> NamedSlots:
        yield self._name, Slot(tuple(self.scores.shape), self.scores.copy_)
