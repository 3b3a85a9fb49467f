"""Granite 3: the Llama decoder with constants on embeddings, attention, residuals and logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.models import llama
from engine.models.hf_config import number
from engine.models.spec import ModelSpec


def facts(config: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    return {
        **llama.facts(config, spec),
        "attention_scale": number(config, "attention_multiplier", 1.0),
        "embedding_scale": number(config, "embedding_multiplier", 1.0),
        "residual_scale": number(config, "residual_multiplier", 1.0),
        "logit_divisor": number(config, "logits_scaling", 1.0),
    }
