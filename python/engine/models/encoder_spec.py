"""The facts of an encoder checkpoint that the engine needs. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from engine.errors import ConfigError

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderNames:
    """Where a family keeps its tensors, without ".weight" and ".bias". None: it has no such part.

    `prefix` is what models with a head put before all of it; `layer` has a place for the number. `qkv` is
    one fused projection, or query, key and value.
    """

    prefix: str
    words: str
    positions: str | None
    types: str | None
    embedding_norm: str
    layer: str
    qkv: tuple[str, ...]
    attention_output: str
    attention_norm: str
    up: str
    down: str
    mlp_norm: str
    final_norm: str | None = None
    ignored: tuple[str, ...] = ()
    """Beginnings of names that only a head which is not used needs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """A bidirectional transformer in numbers and flags.

    `is_pre_norm`: norms come before attention and MLP and not after them, and the first layer's first one
    is left out. `windows` has one entry a layer: tokens seen on each side, itself included; 0 means all.
    `rope_thetas` likewise, empty for models with learned positions, of which the first that is used is
    `first_position`. `num_labels` is that of a classification head, 0 without one, which is of the
    kind `head` and reads the states of a text as `label_pooling` says: "cls" or "mean".
    """

    architecture: str
    names: EncoderNames
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    max_len: int
    norm_eps: float
    activation: str
    dtype: str
    is_gated: bool = False
    is_pre_norm: bool = False
    has_bias: bool = True
    has_norm_bias: bool = True
    num_types: int = 0
    first_position: int = 0
    windows: tuple[int, ...] = ()
    rope_thetas: tuple[float, ...] = ()
    num_labels: int = 0
    head: str = ""
    head_activation: str = ""
    has_head_bias: bool = True
    label_pooling: str = "cls"
    label_activation: str = ""

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_parameters(self) -> int:
        """Elements of all matrices; norms, biases and heads are not worth counting."""
        mlp = (3 if self.is_gated else 2) * self.intermediate_size
        layers = self.num_layers * (4 * self.hidden_size + mlp) * self.hidden_size
        positions = 0 if self.rope_thetas else self.max_len
        return layers + (self.vocab_size + positions + self.num_types) * self.hidden_size


def activation_of(config: Mapping[str, Any], key: str, default: str) -> str:
    """The op's name for an activation of config.json. Raises: `ConfigError` naming the key."""
    name = config.get(key) or default
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ConfigError(
            f"config.json: {key} {name!r:.80} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]
