"""Qwen2 and 2.5 (bias on q, k and v) and Qwen3 (norms on q and k heads); windows on some layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.models.hf_config import flag, integer, layer_windows
from engine.models.spec import ModelSpec

DEFAULT_WINDOW = 4096
DEFAULT_FIRST_WINDOW_LAYER = 28


def qwen2_facts(config: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    return {"qkv_bias": True, "windows": _windows(config, spec)}


def qwen3_facts(config: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    attention_bias = flag(config, "attention_bias")
    return {
        "qkv_bias": attention_bias,
        "output_bias": attention_bias,
        "qk_norm": "head",
        "windows": _windows(config, spec),
    }


def _windows(config: Mapping[str, Any], spec: ModelSpec) -> tuple[int, ...]:
    """`layer_types` says which layers have a window; older files say from which layer on."""
    if not flag(config, "use_sliding_window") or config.get("sliding_window", DEFAULT_WINDOW) is None:
        return (0,) * spec.num_layers
    window = integer(config, "sliding_window", DEFAULT_WINDOW)
    windows = layer_windows(config, spec.num_layers, window)
    if windows is not None:
        return windows
    first = integer(config, "max_window_layers", DEFAULT_FIRST_WINDOW_LAYER, minimum=0)
    return tuple(window if layer >= first else 0 for layer in range(spec.num_layers))
