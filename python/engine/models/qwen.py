"""Qwen2 and 2.5 (bias on q, k and v) and Qwen3 (norms on q and k heads, or experts too); windows on some."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import ConfigError
from engine.models.hf_config import MAX_EXPERTS, flag, integer, layer_windows
from engine.models.spec import ExpertsSpec, ModelSpec

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


def qwen3_moe_facts(config: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """Experts in every `decoder_sparse_step`th layer but those of `mlp_only_layers`."""
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise ConfigError(f"config.json: mlp_only_layers must be a list of layers, got {dense!r:.80}")
    step = integer(config, "decoder_sparse_step", 1)
    key = "num_experts" if "num_experts" in config else "num_local_experts"  # newer files
    num_experts = integer(config, key, 128, minimum=0, maximum=MAX_EXPERTS)
    layers = tuple(
        num_experts > 0 and layer not in dense and (layer + 1) % step == 0 for layer in range(spec.num_layers)
    )
    common = qwen3_facts(config, spec)
    if not any(layers):
        return common
    experts = ExpertsSpec(
        num_experts=num_experts,
        num_chosen=integer(config, "num_experts_per_tok", 8, maximum=num_experts),
        intermediate_size=integer(config, "moe_intermediate_size", 768),
        weighs_all=not flag(config, "norm_topk_prob"),
        layers=layers,
        module_name="mlp",
        router_name="gate",
        projection_names=("gate_proj", "up_proj", "down_proj"),
    )
    return {**common, "experts": experts}


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
