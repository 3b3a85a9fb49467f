"""Mixtral: the Mistral decoder with experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.models.hf_config import MAX_EXPERTS, integer
from engine.models.spec import ExpertsSpec, ModelSpec


def facts(config: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    num_experts = integer(config, "num_local_experts", 8, maximum=MAX_EXPERTS)
    window = 0 if config.get("sliding_window") is None else integer(config, "sliding_window")
    experts = ExpertsSpec(
        num_experts=num_experts,
        num_chosen=integer(config, "num_experts_per_tok", 2, maximum=num_experts),
        intermediate_size=spec.intermediate_size,
        weighs_all=False,
        layers=(True,) * spec.num_layers,
        module_name="block_sparse_moe",
        router_name="gate",
        projection_names=("w1", "w3", "w2"),
    )
    return {"experts": experts, "windows": (window,) * spec.num_layers}
