"""The head of a classification model, from the state of its first token to the scores of its labels."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from engine.models.encoder_layers import LayerNorm
from engine.models.encoder_spec import EncoderSpec
from engine.models.layers import FusedLinear
from engine.models.weights import Slot

_PARTS = {
    "pooler": ("pooler.dense", "tanh", "classifier"),
    "dense": ("classifier.dense", "tanh", "classifier.out_proj"),
    "pre_classifier": ("pre_classifier", "relu", "classifier"),
    "modern": ("head.dense", None, "classifier"),
}


class LabelHead:
    """A layer with its activation, for ModernBERT a norm, and the projection to the labels."""

    def __init__(self, spec: EncoderSpec, *, ops: ModuleType, ctx: Any) -> None:
        hidden, is_modern = spec.hidden_size, spec.head == "modern"
        dense, activation, out = _PARTS[spec.head]
        self._activation = activation or spec.head_activation
        self._ops, self._ctx, self._eps = ops, ctx, spec.norm_eps
        self._dense = FusedLinear(ops, ctx, [(dense, hidden)], hidden, "float32", has_bias=spec.has_head_bias)
        self._norm = LayerNorm("head.norm", hidden, has_bias=spec.has_norm_bias) if is_modern else None
        self._out = FusedLinear(ops, ctx, [(out, spec.num_labels)], hidden, "float32", has_bias=True)
        self._num_labels = spec.num_labels

    def slots(self) -> dict[str, Slot]:
        parts = (self._dense, self._norm, self._out)
        return dict(slot for part in parts if part is not None for slot in part.slots())

    def scores(self, states: torch.Tensor) -> torch.Tensor:
        """Float32 [B, labels] of float32 [B, hidden size]."""
        hidden = torch.empty_like(states)
        self._ops.linear(self._ctx, states, self._dense.weight, self._dense.bias, hidden)
        self._ops.activate(self._ctx, hidden, self._activation, hidden)
        if self._norm is not None:
            norm = self._norm
            self._ops.layer_norm(self._ctx, hidden, None, norm.weight, norm.bias, self._eps, hidden)
        scores = torch.empty(len(states), self._num_labels, device=states.device)
        self._ops.linear(self._ctx, hidden, self._out.weight, self._out.bias, scores)
        return scores
