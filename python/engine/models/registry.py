"""Which architectures are served, by the name that config.json gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from engine.errors import ConfigError
from engine.models import llama, mistral, qwen
from engine.models.spec import ModelSpec


class Family(NamedTuple):
    """What differs between architectures: `facts` returns the `ModelSpec` fields read in their own way."""

    facts: Callable[[Mapping[str, Any], ModelSpec], dict[str, Any]]
    default_head_dim: int | None = None


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "LlamaForCausalLM": Family(llama.facts),
        "MistralForCausalLM": Family(mistral.facts),
        "Qwen2ForCausalLM": Family(qwen.qwen2_facts),
        "Qwen3ForCausalLM": Family(qwen.qwen3_facts, default_head_dim=128),
    }
)


def architecture_of(config: Mapping[str, Any]) -> str:
    """The first supported name in `architectures`.

    Raises: `ConfigError` that lists what is supported; also for quantised checkpoints.
    """
    names = config.get("architectures")
    if not isinstance(names, list):
        names = []
    for name in names:
        if isinstance(name, str) and name in FAMILIES:
            if config.get("quantization_config") is not None:
                raise ConfigError("quantised checkpoints are not supported; use the bfloat16 one")
            return name
    found = ", ".join(map(str, names)) or "none in config.json"
    raise ConfigError(f"unsupported architecture: {found}; supported: {', '.join(FAMILIES)}")
