"""The facts of a model that runs through transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class AttentionLayer:
    """What one call of attention needs. `key_dim` and `value_dim` are sizes of a head; `window` counts the
    tokens that a query sees, itself included, 0 meaning all. `has_bias`: keys hold one of their positions."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int
    has_bias: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformersSpec:
    """What the engine must know before the weights are there; learnt from a dry run of the modules.

    The cache has `num_layers` layers of `num_kv_heads` heads of `head_dim` numbers, which hold the largest
    of `layers` (by the number that transformers gives a layer). `dtype` is that of the checkpoint.
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    num_parameters: int
    layers: tuple[tuple[int, AttentionLayer], ...]
    trusts_remote_code: bool
    largest_dequantized: int = 0
    """As of `ModelSpec`."""

    is_causal: bool = True
    """Always: others are refused."""

    @property
    def has_position_bias(self) -> bool:
        """Whether a key holds the bias of its position, which may be far larger than its other numbers."""
        return any(layer.has_bias for _, layer in self.layers)

    stored: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """None: only models of ours take matrices as few bits from a checkpoint."""
