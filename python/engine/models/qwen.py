"""Qwen2 and 2.5 (bias on q, k and v) and Qwen3 (norms on q and k heads); windows on some layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import ConfigError
from engine.models.hf_config import flag, integer
from engine.models.spec import ModelSpec

DEFAULT_WINDOW = 4096
DEFAULT_FIRST_WINDOW_LAYER = 28
WINDOWED = "sliding_attention"
LAYER_TYPES = ("full_attention", WINDOWED)


def qwen2_facts(config: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    return {"qkv_bias": True, "windows": _windows(config, spec)}


def qwen3_facts(config: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    attention_bias = flag(config, "attention_bias")
    return {
        "qkv_bias": attention_bias,
        "output_bias": attention_bias,
        "qk_norm": True,
        "windows": _windows(config, spec),
    }


def _windows(config: Mapping[str, Any], spec: ModelSpec) -> tuple[int, ...]:
    """`layer_types` says which layers have a window; older files say from which layer on."""
    if not flag(config, "use_sliding_window") or config.get("sliding_window", DEFAULT_WINDOW) is None:
        return (0,) * spec.num_layers
    window = integer(config, "sliding_window", DEFAULT_WINDOW)
    layer_types = config.get("layer_types")
    if layer_types is None:
        first = integer(config, "max_window_layers", DEFAULT_FIRST_WINDOW_LAYER, minimum=0)
        return tuple(window if layer >= first else 0 for layer in range(spec.num_layers))
    if not isinstance(layer_types, list) or any(kind not in LAYER_TYPES for kind in layer_types):
        raise ConfigError(
            f"config.json: layer_types may name {' and '.join(LAYER_TYPES)}, got {layer_types!r:.80}"
        )
    return tuple(window if kind == WINDOWED else 0 for kind in layer_types)
