"""gpt-oss: experts in every layer, a learned score beside each softmax, windows on every other layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import ConfigError
from engine.models.hf_config import MAX_EXPERTS, FamilyDefaults, flag, integer, layer_windows, number
from engine.models.spec import ExpertsSpec, ModelSpec, StoredFormat

DEFAULTS = FamilyDefaults(head_dim=64, rope_theta=150000.0)
QUANTIZATION = "mxfp4"
MXFP4_BLOCK = 32
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def facts(config: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    has_bias = flag(config, "attention_bias", True)
    window = integer(config, "sliding_window", 128)
    windows = layer_windows(config, spec.num_layers, window)
    if windows is None:
        windows = tuple(window if (layer + 1) % 2 else 0 for layer in range(spec.num_layers))
    is_mxfp4 = config.get("quantization_config") is not None
    if is_mxfp4 and (spec.hidden_size % MXFP4_BLOCK or spec.intermediate_size % MXFP4_BLOCK):
        raise ConfigError(
            f"{QUANTIZATION} needs hidden and intermediate sizes that are multiples of {MXFP4_BLOCK}"
        )
    num_experts = integer(config, "num_local_experts", 128, maximum=MAX_EXPERTS)
    experts = ExpertsSpec(
        num_experts=num_experts,
        num_chosen=integer(config, "num_experts_per_tok", 4, maximum=num_experts),
        intermediate_size=spec.intermediate_size,
        weighs_all=False,
        layers=(True,) * spec.num_layers,
        module_name="mlp",
        router_name="router",
        stacking=QUANTIZATION if is_mxfp4 else "dense",
        has_bias=True,
        projection_names=PROJECTIONS,
        swiglu=(number(config, "swiglu_alpha", 1.702), number(config, "swiglu_limit", 7.0)),
    )
    return {
        "stored": _stored(num_experts, spec.num_layers) if is_mxfp4 else {},
        "qkv_bias": has_bias,
        "output_bias": has_bias,
        "windows": windows,
        "experts": experts,
        "has_sinks": True,
    }


def _stored(num_experts: int, num_layers: int) -> dict[str, StoredFormat]:
    """All matrices of the experts: twice a number of MXFP4 is an integer from -12 to 12."""
    kind = StoredFormat("int8", MXFP4_BLOCK)
    experts = [f"model.layers.{i}.mlp.experts.{j}" for i in range(num_layers) for j in range(num_experts)]
    return {f"{expert}.{name}": kind for expert in experts for name in PROJECTIONS}
