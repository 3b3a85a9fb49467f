"""Weights of linear layers and norms, each knowing which checkpoint tensors fill it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Any

import torch

from engine.errors import CheckpointError
from engine.models.coded_weight import CodedWeight
from engine.models.lora_sites import Site
from engine.models.spec import StoredFormat
from engine.models.weights import Slot
from engine.ops.gated import GATE_UP_MULTIPLE

NamedSlots = Iterator[tuple[str, Slot]]
NOTHING_STORED: Mapping[str, StoredFormat] = MappingProxyType({})

ONE_PASS_ROWS = 48
"""From so many rows on a gated product is one pass. Gate and up of fewer stay in the caches, and two passes
read the weights in longer stretches; see docs/experiments.md."""

MOST_INT4 = 8 * 65_504.0
"""Magnitude of the largest weight that a half-precision scale and four bits hold."""


class _Segment:
    """Rows of a fused layer that one packed matrix holds: parts that are stored alike.

    Plain int8 weights wait until all parts are there: how columns are scaled follows from the whole matrix.
    """

    def __init__(
        self, ctx: Any, matrix: Any, rows: slice, parts: Sequence[tuple[str, int]], is_balanced: bool
    ) -> None:
        self.matrix, self.rows = matrix, rows
        self._ctx, self._parts, self._is_balanced = ctx, parts, is_balanced
        self._waiting: dict[int, torch.Tensor] = {}

    def store(self, first_row: int, weight: torch.Tensor | CodedWeight) -> None:
        """A part, from a row of the matrix on."""
        if isinstance(weight, CodedWeight):
            self.matrix.pack_codes(self._ctx, first_row, weight.codes, weight.scales, weight.offsets)
            if weight.column_order is not None:
                self.matrix.column_order = weight.column_order.tolist()
        elif self._is_balanced:
            self._waiting[first_row] = weight
            if len(self._waiting) == len(self._parts):
                parts = [part for _, part in sorted(self._waiting.items())]
                self._waiting.clear()
                self.fill(parts)
        else:
            self._pack(first_row, weight)

    def fill(self, parts: Sequence[torch.Tensor]) -> None:
        if self._is_balanced:
            self.matrix.balance_columns(self._ctx, list(parts))
        first_row = 0
        for part in parts:
            self._pack(first_row, part)
            first_row += len(part)

    def _pack(self, first_row: int, weight: torch.Tensor) -> None:
        """Raises: `CheckpointError` for weights that the format would silently make others of."""
        if self.matrix.dtype == "int4" and (most := max(map(abs, map(float, weight.aminmax())))) > MOST_INT4:
            ends = itertools.accumulate(rows for _, rows in self._parts)
            name = next(name for (name, _), end in zip(self._parts, ends, strict=True) if first_row < end)
            raise CheckpointError(
                f"weights of {name} reach {most:,.0f}: int4 holds {MOST_INT4:,.0f} at most, int8 any"
            )
        self.matrix.pack_rows(self._ctx, first_row, weight)


class FusedLinear:
    """Projections of one input packed one under the other, so that one product serves them all.

    `parts` are (checkpoint name without ".weight", rows) in order. The bias is float32. Parts that the
    checkpoint stores in few bits (`stored`, by name) are kept so; only neighbours that are stored alike
    share a product.
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
        stored: Mapping[str, StoredFormat] = NOTHING_STORED,
    ) -> None:
        self.out_features = sum(rows for _, rows in parts)
        self.bias = torch.zeros(self.out_features) if has_bias else None
        self._ops, self._ctx = ops, ctx
        self._parts = parts
        self.in_features = in_features
        self.site = -1
        """Its number for adapters; given by the model that they are for."""
        self._segments = list(self._pack_alike(dtype, stored))

    def _pack_alike(self, dtype: str, stored: Mapping[str, StoredFormat]) -> Iterator[_Segment]:
        first_row = 0
        for part_format, group in itertools.groupby(self._parts, key=lambda part: stored.get(part[0])):
            is_alone = part_format is not None and part_format.has_order
            group = list(group)
            for parts in [[part] for part in group] if is_alone else [group]:
                rows = sum(rows for _, rows in parts)
                kind = (dtype,) if part_format is None else (part_format.dtype, part_format.group_len)
                matrix = self._ops.PackedMatrix(rows, self.in_features, *kind)
                is_balanced = part_format is None and dtype == "int8"
                place = slice(first_row, first_row + rows)
                yield _Segment(self._ctx, matrix, place, parts, is_balanced)
                first_row += rows

    @property
    def matrices(self) -> list[Any]:
        return [segment.matrix for segment in self._segments]

    @property
    def weight(self) -> Any:
        """The packed matrix of a layer that has only one, as all of one part have."""
        (segment,) = self._segments
        return segment.matrix

    def multiply(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """out = x weightᵀ + bias. Shapes: x float32 [T, in_features], out float32 [T, out_features]."""
        if len(self._segments) == 1:
            self._ops.linear(self._ctx, x, self._segments[0].matrix, self.bias, out)
            return
        for segment in self._segments:
            bias = None if self.bias is None else self.bias[segment.rows]
            self._ops.linear(self._ctx, x, segment.matrix, bias, out[:, segment.rows])

    def slots(self) -> NamedSlots:
        start = 0
        segments = iter(self._segments)
        segment = next(segments)
        for name, rows in self._parts:
            if start == segment.rows.stop:
                segment = next(segments)
            store = functools.partial(segment.store, start - segment.rows.start)
            yield f"{name}.weight", Slot((rows, self.in_features), store, matrix=segment.matrix)
            if self.bias is not None:
                yield f"{name}.bias", Slot((rows,), self.bias[start : start + rows].copy_, dummy="zeros")
            start += rows

    @property
    def lora_site(self) -> Site:
        return Site.of(self.in_features, self._parts)

    def fill(self, parts: Sequence[torch.Tensor]) -> None:
        """Store the whole matrix, given in pieces of rows. For layers of which nothing is in few bits."""
        (segment,) = self._segments
        segment.fill(parts)

    def fill_coded(self, weight: CodedWeight) -> None:
        """The same for a layer whose parts are all in the same few bits."""
        (segment,) = self._segments
        segment.store(0, weight)


class GatedLinear(FusedLinear):
    """Gate and up projections of an MLP, in this order, and what is made of them: activation(gate) * up, with
    "silu", "gelu_tanh" or "gelu"."""

    def __init__(self, *args: Any, activation: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._activation = activation
        ops = self._ops
        self._join = {"silu": ops.silu_mul, "gelu_tanh": ops.gelu_mul, "gelu": ops.erf_gelu_mul}[activation]
        fits = len(self._segments) == 1 and self.out_features % GATE_UP_MULTIPLE == 0
        self._is_one_op = fits and hasattr(ops, "gated_linear")  # a GPU has no such op

    def multiply_gated(self, x: torch.Tensor, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        """out = activation(gate) * up. Shapes: x float32 [T, in_features], out float32 [T, I], `gate_up`
        float32 [T, 2 I], memory that may be used."""
        if self._is_one_op and x.shape[0] >= ONE_PASS_ROWS:
            matrix = self._segments[0].matrix
            self._ops.gated_linear(self._ctx, x, matrix, self.bias, self._activation, out)
        else:
            self.multiply(x, gate_up)
            self.join(gate_up, out)

    def multiply_both(
        self,
        x: torch.Tensor,
        gate_up: torch.Tensor,
        product: torch.Tensor,
        down: FusedLinear,
        out: torch.Tensor,
    ) -> None:
        """out = (activation(gate) * up) downᵀ. As `multiply_gated`; `product` [T, I] is memory, too."""
        if self._is_one_op and x.shape[0] >= ONE_PASS_ROWS and len(down._segments) == 1:
            first = x, self.weight, self.bias, self._activation
            self._ops.gated_mlp(self._ctx, *first, product, down.weight, down.bias, out)
        else:
            self.multiply_gated(x, gate_up, product)
            down.multiply(product, out)

    def join(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        """The same from gate and up, to which an adapter has added; with the same bits."""
        self._join(self._ctx, gate_up, out)


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
