"""From the hidden states of texts to their vectors: pooling, dense layers, normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from engine.config.model_location import root_of
from engine.models.embedding_spec import DenseSpec, EmbeddingSpec, NormSpec
from engine.models.encoder_layers import LayerNorm
from engine.models.layers import FusedLinear
from engine.models.weights import load_checkpoint, load_dummy
from engine.ops.placement import Placement

POOL_MODES = {"mean": "sum", "mean_sqrt_len": "sum", "weighted_mean": "weighted_sum", "max": "max"}
"""What the op `pool` does for each way of pooling that reads all rows."""
_LAYER_NORM_EPS = 1e-5
"""Torch's own, as the module says none."""
_LEAST_NORM = 1e-12
"""A vector shorter than this is not stretched."""


class EmbeddingHead:
    """What an `EmbeddingSpec` asks for, on hidden states of `hidden_size` numbers."""

    def __init__(self, spec: EmbeddingSpec, hidden_size: int, *, ops: ModuleType, ctx: Any) -> None:
        self.spec = spec
        self.hidden_size = hidden_size
        self.size = spec.size(hidden_size)
        self._ops, self._ctx = ops, ctx
        self._dense = [self._layer(dense) for dense in spec.dense]
        self._unit = torch.full((self.size,), self.size**-0.5)

    @classmethod
    def beside(
        cls, spec: EmbeddingSpec, hidden_size: int, *, ops: ModuleType, ctx: Any, placement: Placement
    ) -> EmbeddingHead:
        """The head of a model with these `ops`. What pooling leaves of a text is little work, which the host
        does beside a GPU."""
        if not placement.is_host:
            from engine.ops import native as ops  # not where only the reference is used

            ctx = ops.ExecutionContext(1, "auto")
        return cls(spec, hidden_size, ops=ops, ctx=ctx)

    def _layer(self, spec: DenseSpec | NormSpec) -> FusedLinear | LayerNorm:
        if isinstance(spec, NormSpec):
            return LayerNorm("norm", spec.size, has_bias=True)
        rows = [("linear", spec.out_features)]
        return FusedLinear(self._ops, self._ctx, rows, spec.in_features, "float32", has_bias=spec.has_bias)

    def load(self, directory: str | Path, *, is_dummy: bool = False) -> None:
        """Raises: `CheckpointError` when a layer is not what its config.json says."""
        for dense, layer in zip(self.spec.dense, self._dense, strict=True):
            slots = dict(layer.slots())
            if is_dummy:
                load_dummy(slots)
            else:
                load_checkpoint(root_of(Path(directory)) / dense.folder, slots)

    def start(self, lens: Sequence[int]) -> PoolingBatch:
        """Begin with texts of these lengths, in tokens."""
        return PoolingBatch(self, np.asarray(lens))

    def vectors(self, parts: Sequence[torch.Tensor], lens: np.ndarray) -> np.ndarray:
        """Float32 [B, size] of what each way of pooling made of all rows of texts of `lens` tokens: float32
        [B, hidden size] each, which are overwritten."""
        counts = torch.from_numpy(lens.astype(np.float32))[:, None]
        divisors = {
            "mean": counts,
            "mean_sqrt_len": counts.sqrt(),
            "weighted_mean": counts * (counts + 1) / 2,
        }
        for mode, part in zip(self.spec.pooling, parts, strict=True):
            if mode in divisors:
                part /= divisors[mode]
        return self.finish(parts[0] if len(parts) == 1 else torch.cat(list(parts), 1))

    def finish(self, pooled: torch.Tensor) -> np.ndarray:
        """Vectors float32 [B, size] from pooled states [B, hidden size * modes]."""
        for dense, layer in zip(self.spec.dense, self._dense, strict=True):
            if isinstance(layer, LayerNorm):
                self._ops.layer_norm(
                    self._ctx, pooled, None, layer.weight, layer.bias, _LAYER_NORM_EPS, pooled
                )
                continue
            assert isinstance(dense, DenseSpec)
            out = torch.empty(len(pooled), dense.out_features)
            self._ops.linear(self._ctx, pooled, layer.weight, layer.bias, out)
            if dense.activation is not None:
                self._ops.activate(self._ctx, out, dense.activation, out)
            pooled = out
        if self.spec.is_normalized:  # x / sqrt(mean(x^2)) / sqrt(size) is x / |x|
            eps = _LEAST_NORM**2 / self.size
            self._ops.rms_norm(self._ctx, pooled, self._unit, eps, pooled)
        return pooled.numpy()

    def pool(self, *arguments: Any) -> None:
        self._ops.pool(self._ctx, *arguments)


class PoolingBatch:
    """The texts of one batch, taken up piece by piece."""

    def __init__(self, head: EmbeddingHead, lens: np.ndarray) -> None:
        self._head = head
        self._lens = lens
        shape = len(lens), head.hidden_size
        self._parts = [
            torch.full(shape, float("-inf")) if mode == "max" else torch.zeros(shape)
            for mode in head.spec.pooling
        ]

    def take(self, hidden: torch.Tensor, cu_rows: torch.Tensor, starts: torch.Tensor) -> None:
        """The next rows of each text.

        Shapes: `hidden` float32 [T, hidden size]; `cu_rows` int32 [B + 1], prefix sums of the rows of each
        text; `starts` int32 [B], the position of each text's first row here.
        """
        for mode, part in zip(self._head.spec.pooling, self._parts, strict=True):
            if mode in POOL_MODES:
                self._head.pool(hidden, cu_rows, starts, POOL_MODES[mode], part)
            elif mode == "last":
                torch.index_select(hidden, 0, cu_rows[1:] - 1, out=part)
            elif not starts.any():  # cls
                torch.index_select(hidden, 0, cu_rows[:-1], out=part)

    def vectors(self) -> np.ndarray:
        """Float32 [B, size], when all rows were taken."""
        return self._head.vectors(self._parts, self._lens)
