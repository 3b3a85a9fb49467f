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
        self._in_features = in_features
        self.site = -1
        """Its number for adapters; given by the model that they are for."""
        self._is_balanced = dtype == "int8"
        self._waiting: dict[int, torch.Tensor] = {}

    def slots(self) -> NamedSlots:
        start = 0
        for name, rows in self._parts:
            store = functools.partial(self._store, start)
            yield f"{name}.weight", Slot((rows, self._in_features), store, matrix=self.weight)
            if self.bias is not None:
                yield f"{name}.bias", Slot((rows,), self.bias[start : start + rows].copy_, dummy="zeros")
            start += rows

    @property
    def lora_site(self) -> Site:
        return Site.of(self._in_features, self._parts)

    def _store(self, start: int, weight: torch.Tensor) -> None:
        if not self._is_balanced:
            self.weight.pack_rows(self._ctx, start, weight)
            return
        self._waiting[start] = weight
        if len(self._waiting) == len(self._parts):
            parts = dict(sorted(self._waiting.items()))
            self._waiting.clear()
            self.weight.balance_columns(self._ctx, list(parts.values()))
            for first_row, part in parts.items():
                self.weight.pack_rows(self._ctx, first_row, part)


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
