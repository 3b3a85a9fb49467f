"""Phi-3, 3.5 and 4: the shared decoder from fused projections, often with LongRoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.models.hf_config import integer
from engine.models.spec import ModelSpec


def facts(config: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    window = 0 if config.get("sliding_window") is None else integer(config, "sliding_window")
    return {"has_fused_projections": True, "windows": (window,) * spec.num_layers}
