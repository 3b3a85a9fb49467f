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


class DecoderLayer:
    """Attention and gated MLP of one layer. `window` 0 means that every earlier token is seen.

    A norm that the model does not have is None: `input_norm` and `mlp_norm` stand before attention and
    MLP, `attention_norm` and `update_norm` after them; `q_norm` and `k_norm` are over a head or a row.
    """

    def __init__(self, ops: ModuleType, ctx: Any, spec: ModelSpec, index: int, dtype: str) -> None:
        prefix = f"model.layers.{index}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        hidden, heads = spec.hidden_size, spec.num_heads * spec.head_dim
        kv_heads = spec.num_kv_heads * spec.head_dim
        if spec.has_fused_projections:
            qkv = [(f"{attention}.qkv_proj", spec.qkv_size)]
            gate_up = [(f"{mlp}.gate_up_proj", 2 * spec.intermediate_size)]
        else:
            sizes = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}
            qkv = [(f"{attention}.{name}", rows) for name, rows in sizes.items()]
            gate_up = [(f"{mlp}.{name}", spec.intermediate_size) for name in ("gate_proj", "up_proj")]

        def norm(name: str, size: int = hidden) -> Norm:
            return Norm(f"{prefix}.{name}", size, spec.norm_offset)

        self.window, self.rope = spec.windows[index], spec.ropes[index]
        self.input_norm = None if spec.norms == "after" else norm("input_layernorm")
        self.qkv = FusedLinear(ops, ctx, qkv, hidden, dtype, has_bias=spec.qkv_bias)
        self.q_norm = self.k_norm = None
        if spec.qk_norm != "none":
            is_row = spec.qk_norm == "row"
            self.q_norm = norm("self_attn.q_norm", heads if is_row else spec.head_dim)
            self.k_norm = norm("self_attn.k_norm", kv_heads if is_row else spec.head_dim)
        output = [(f"{attention}.o_proj", hidden)]
        self.output = FusedLinear(ops, ctx, output, heads, dtype, has_bias=spec.output_bias)
        self.attention_norm = self.mlp_norm = self.update_norm = None
        if spec.norms == "before":
            self.mlp_norm = norm("post_attention_layernorm")
        else:
            self.attention_norm = norm("post_attention_layernorm")
            self.update_norm = norm("post_feedforward_layernorm")
        if spec.norms == "both":
            self.mlp_norm = norm("pre_feedforward_layernorm")
        self.gate_up = FusedLinear(ops, ctx, gate_up, hidden, dtype, has_bias=spec.mlp_bias)
        down = [(f"{mlp}.down_proj", hidden)]
        self.down = FusedLinear(ops, ctx, down, spec.intermediate_size, dtype, has_bias=spec.mlp_bias)

    def slots(self) -> NamedSlots:
        attention = (self.input_norm, self.qkv, self.q_norm, self.k_norm, self.output, self.attention_norm)
        for part in (*attention, self.mlp_norm, self.gate_up, self.down, self.update_norm):
            if part is not None:
                yield from part.slots()
