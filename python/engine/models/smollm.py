"""SmolLM3: the Llama decoder in which every fourth layer does not encode positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import ConfigError
from engine.models import llama
from engine.models.hf_config import flag, integer, layer_windows
from engine.models.spec import ModelSpec


def facts(config: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    has_rope = _has_rope(config, spec.num_layers)
    windows = (0,) * spec.num_layers
    if flag(config, "use_sliding_window") and config.get("sliding_window") is not None:
        window = integer(config, "sliding_window")
        windows = layer_windows(config, spec.num_layers, window)
        if windows is None:
            windows = tuple(0 if has else window for has in has_rope)
    return {
        **llama.facts(config, spec),
        "ropes": tuple(rope if has else None for has, rope in zip(has_rope, spec.ropes, strict=True)),
        "windows": windows,
    }


def _has_rope(config: Mapping[str, Any], num_layers: int) -> list[bool]:
    """`no_rope_layers` holds 1 where positions are encoded, in spite of its name."""
    value = config.get("no_rope_layers")
    if value is None:
        period = integer(config, "no_rope_layer_interval", 4)
        return [(layer + 1) % period != 0 for layer in range(num_layers)]
    if not isinstance(value, list) or len(value) != num_layers or any(item not in (0, 1) for item in value):
        raise ConfigError(f"config.json: no_rope_layers must be a list of {num_layers} zeros and ones")
    return [bool(item) for item in value]
