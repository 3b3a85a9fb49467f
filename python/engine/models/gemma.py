"""Gemma 2 and 3 (text): norms before and after, scaled embeddings, windows on most layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.models.hf_config import (
    FamilyDefaults,
    flag,
    integer,
    layer_windows,
    number,
    read_rope,
    rope_parameters,
)
from engine.models.spec import ModelSpec

DEFAULTS = FamilyDefaults(head_dim=256, ties_embeddings=True)
DEFAULT_WINDOW = 4096
LOCAL_ROPE_THETA = 10000.0


def gemma2_facts(config: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    return {
        **_common(config, spec, window_period=2),
        "attention_softcap": _softcap(config, "attn_logit_softcapping", 50.0),
        "logit_softcap": _softcap(config, "final_logit_softcapping", 30.0),
    }


def gemma3_facts(config: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """Layers with a window have a rotary base of their own, which no scaling touches."""
    common = _common(config, spec, window_period=integer(config, "sliding_window_pattern", 6))
    if flag(config, "use_bidirectional_attention"):  # then `sliding_window` counts both sides
        common["windows"] = tuple(window and window // 2 + 1 for window in common["windows"])
    local = rope_parameters(config, "sliding_attention", is_layered=True)
    base = number(local, "rope_theta", number(config, "rope_local_base_freq", LOCAL_ROPE_THETA))
    local = {**local, "rope_theta": base}
    local_rope = read_rope({}, local, spec.head_dim, spec.max_position_embeddings, LOCAL_ROPE_THETA)
    return {
        **common,
        "qk_norm": "head",
        "ropes": tuple(
            local_rope if window else rope for window, rope in zip(common["windows"], spec.ropes, strict=True)
        ),
        "attention_softcap": _softcap(config, "attn_logit_softcapping", 0.0),
        "logit_softcap": _softcap(config, "final_logit_softcapping", 0.0),
    }


def _common(config: Mapping[str, Any], spec: ModelSpec, window_period: int) -> dict[str, Any]:
    """Where `layer_types` is absent, every layer but each `window_period`th has a window."""
    window = integer(config, "sliding_window", DEFAULT_WINDOW)
    windows = layer_windows(config, spec.num_layers, window)
    if windows is None:
        windows = tuple(window if (i + 1) % window_period else 0 for i in range(spec.num_layers))
    return {
        "activation": spec.activation if _names_activation(config) else "gelu_tanh",
        "windows": windows,
        "attention_scale": number(config, "query_pre_attn_scalar", 256.0) ** -0.5,
        "embedding_scale": spec.hidden_size**0.5,
        "norms": "both",
        "norm_offset": 1.0,
    }


def _names_activation(config: Mapping[str, Any]) -> bool:
    return bool(config.get("hidden_activation") or config.get("hidden_act"))


def _softcap(config: Mapping[str, Any], key: str, default: float) -> float:
    """An absent key means the default; null means no bound."""
    if key not in config:
        return default
    return 0.0 if config[key] is None else number(config, key)
