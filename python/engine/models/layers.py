"""The weights of a decoder layer, each knowing which checkpoint tensors fill it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch

from engine.models.spec import ModelSpec
from engine.models.weights import Slot

NamedSlots = Iterator[tuple[str, Slot]]


class FusedLinear:
    """Projections of one input packed one under the other, so that one product serves them all.

    `parts` are (checkpoint name without ".weight", rows) in order. The bias is float32.
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

    def slots(self) -> NamedSlots:
        start = 0
        for name, rows in self._parts:
            yield f"{name}.weight", Slot((rows, self._in_features), self._weight_store(start))
            if self.bias is not None:
                yield f"{name}.bias", Slot((rows,), self.bias[start : start + rows].copy_, dummy="zeros")
            start += rows

    def _weight_store(self, start: int) -> Any:
        return lambda weight: self.weight.pack_rows(self._ctx, start, weight)


class Norm:
    """Weight of a root-mean-square normalisation, float32 whatever the checkpoint holds."""

    def __init__(self, name: str, size: int) -> None:
        self.weight = torch.ones(size)
        self._name = name

    def slots(self) -> NamedSlots:
        yield f"{self._name}.weight", Slot(tuple(self.weight.shape), self.weight.copy_, dummy="ones")


class DecoderLayer:
    """Attention and gated MLP of one layer. `window` 0 means that every earlier token is seen."""

    def __init__(self, ops: ModuleType, ctx: Any, spec: ModelSpec, index: int, dtype: str) -> None:
        prefix = f"model.layers.{index}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        hidden, heads = spec.hidden_size, spec.num_heads * spec.head_dim
        kv_heads = spec.num_kv_heads * spec.head_dim
        qkv = [
            (f"{attention}.q_proj", heads),
            (f"{attention}.k_proj", kv_heads),
            (f"{attention}.v_proj", kv_heads),
        ]
        gate_up = [(f"{mlp}.gate_proj", spec.intermediate_size), (f"{mlp}.up_proj", spec.intermediate_size)]

        self.window = spec.windows[index]
        self.input_norm = Norm(f"{prefix}.input_layernorm", hidden)
        self.qkv = FusedLinear(ops, ctx, qkv, hidden, dtype, has_bias=spec.qkv_bias)
        self.q_norm = Norm(f"{attention}.q_norm", spec.head_dim) if spec.qk_norm else None
        self.k_norm = Norm(f"{attention}.k_norm", spec.head_dim) if spec.qk_norm else None
        output = [(f"{attention}.o_proj", hidden)]
        self.output = FusedLinear(ops, ctx, output, heads, dtype, has_bias=spec.output_bias)
        self.mlp_norm = Norm(f"{prefix}.post_attention_layernorm", hidden)
        self.gate_up = FusedLinear(ops, ctx, gate_up, hidden, dtype, has_bias=spec.mlp_bias)
        down = [(f"{mlp}.down_proj", hidden)]
        self.down = FusedLinear(ops, ctx, down, spec.intermediate_size, dtype, has_bias=spec.mlp_bias)

    def slots(self) -> NamedSlots:
        parts = (self.input_norm, self.qkv, self.q_norm, self.k_norm, self.output)
        for part in (*parts, self.mlp_norm, self.gate_up, self.down):
            if part is not None:
                yield from part.slots()
