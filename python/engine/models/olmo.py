"""OLMo 2: norms after attention and MLP, and over all heads of q and of k at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.models.hf_config import flag
from engine.models.spec import ModelSpec


def facts(config: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    attention_bias = flag(config, "attention_bias")
    return {
        "qkv_bias": attention_bias,
        "output_bias": attention_bias,
        "qk_norm": "row",
        "norms": "after",
    }
