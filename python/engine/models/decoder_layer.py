"""The weights of one layer of the decoder."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, NamedTuple

from engine.models.experts import Experts
from engine.models.layers import FusedLinear, GatedLinear, NamedSlots, Norm, Sinks
from engine.models.spec import ModelSpec


class Mlp(NamedTuple):
    """A gated MLP. Biases follow from the parts."""

    gate_up: GatedLinear
    down: FusedLinear

    def slots(self) -> NamedSlots:
        yield from self.gate_up.slots()
        yield from self.down.slots()


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
        linear = functools.partial(FusedLinear, ops, ctx, stored=spec.stored)
        self.qkv = linear(qkv, hidden, dtype, has_bias=spec.qkv_bias)
        self.q_norm = self.k_norm = None
        if spec.qk_norm != "none":
            is_row = spec.qk_norm == "row"
            self.q_norm = norm("self_attn.q_norm", heads if is_row else spec.head_dim)
            self.k_norm = norm("self_attn.k_norm", kv_heads if is_row else spec.head_dim)
        self.sinks = Sinks(f"{attention}.sinks", spec.num_heads) if spec.has_sinks else None
        output = [(f"{attention}.o_proj", hidden)]
        self.output = linear(output, heads, dtype, has_bias=spec.output_bias)
        self.attention_norm = self.mlp_norm = self.update_norm = None
        if spec.norms == "before":
            self.mlp_norm = norm("post_attention_layernorm")
        else:
            self.attention_norm = norm("post_attention_layernorm")
            self.update_norm = norm("post_feedforward_layernorm")
        if spec.norms == "both":
            self.mlp_norm = norm("pre_feedforward_layernorm")
        if spec.experts is not None and spec.experts.layers[index]:
            module = f"{prefix}.{spec.experts.module_name}"
            self.mlp = Experts(ops, ctx, spec.experts, hidden, module, dtype, spec.stored)
        else:
            down = [(f"{mlp}.down_proj", hidden)]
            gated = functools.partial(GatedLinear, ops, ctx, stored=spec.stored, activation=spec.activation)
            self.mlp = Mlp(
                gated(gate_up, hidden, dtype, has_bias=spec.mlp_bias),
                linear(down, spec.intermediate_size, dtype, has_bias=spec.mlp_bias),
            )

    def slots(self) -> NamedSlots:
        attention = (self.input_norm, self.qkv, self.q_norm, self.k_norm, self.sinks)
        for part in (*attention, self.output, self.attention_norm, self.mlp_norm, self.mlp, self.update_norm):
            if part is not None:
                yield from part.slots()
