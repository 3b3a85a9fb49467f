"""Weights of an encoder, each knowing which checkpoint tensors fill it."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch

from engine.models.encoder_spec import EncoderSpec
from engine.models.layers import FusedLinear, GatedLinear, NamedSlots
from engine.models.weights import Slot


class LayerNorm:
    """Weight and, where there is one, bias; float32 whatever the checkpoint holds."""

    def __init__(self, name: str, size: int, *, has_bias: bool) -> None:
        self.weight = torch.ones(size)
        self.bias = torch.zeros(size) if has_bias else None
        self._name = name

    def slots(self) -> NamedSlots:
        yield f"{self._name}.weight", Slot(tuple(self.weight.shape), self.weight.copy_, dummy="ones")
        if self.bias is not None:
            yield f"{self._name}.bias", Slot(tuple(self.bias.shape), self.bias.copy_, dummy="zeros")


class Table:
    """Rows to look up: words, positions or token types."""

    def __init__(self, name: str, num_rows: int, size: int, dtype: str) -> None:
        self.weight = torch.zeros(num_rows, size, dtype=getattr(torch, dtype))
        self._name = name

    def slots(self) -> NamedSlots:
        yield f"{self._name}.weight", Slot(tuple(self.weight.shape), self.weight.copy_)


class EncoderLayer:
    """Attention and MLP of one layer. The first norm of the first pre-norm layer does not exist."""

    def __init__(self, ops: ModuleType, ctx: Any, spec: EncoderSpec, index: int, dtype: str) -> None:
        names, hidden, inner = spec.names, spec.hidden_size, spec.intermediate_size
        prefix = names.layer.format(index)

        def linear(*parts: tuple[str, int], in_features: int, kind: Any = FusedLinear) -> Any:
            named = [(prefix + name, rows) for name, rows in parts]
            return kind(ops, ctx, named, in_features, dtype, has_bias=spec.has_bias)

        def norm(name: str) -> LayerNorm:
            return LayerNorm(prefix + name, hidden, has_bias=spec.has_norm_bias)

        rows = 3 * hidden // len(names.qkv)
        self.window = spec.windows[index]
        self.qkv = linear(*((name, rows) for name in names.qkv), in_features=hidden)
        self.output = linear((names.attention_output, hidden), in_features=hidden)
        if spec.is_gated:
            gated = functools.partial(GatedLinear, activation=spec.activation)
            self.up = linear((names.up, 2 * inner), in_features=hidden, kind=gated)
        else:
            self.up = linear((names.up, inner), in_features=hidden)
        self.down = linear((names.down, hidden), in_features=inner)
        self.attention_norm = None if spec.is_pre_norm and index == 0 else norm(names.attention_norm)
        self.mlp_norm = norm(names.mlp_norm)

    def slots(self) -> NamedSlots:
        for part in (self.qkv, self.output, self.up, self.down, self.attention_norm, self.mlp_norm):
            if part is not None:
                yield from part.slots()
