"""Mistral: the shared decoder with one sliding window for all layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.models.hf_config import integer
from engine.models.spec import ModelSpec

DEFAULT_WINDOW = 4096


def facts(config: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """An absent `sliding_window` means the window of the first release; null means none."""
    if "sliding_window" in config and config["sliding_window"] is None:
        return {}
    return {"windows": (integer(config, "sliding_window", DEFAULT_WINDOW),) * spec.num_layers}
