"""RoBERTa and XLM-RoBERTa: BERT whose positions begin after that of padding."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from engine.errors import ConfigError
from engine.models import bert
from engine.models.hf_config import integer

NAMES = dataclasses.replace(
    bert.NAMES, prefix="roberta.", ignored=(*bert.NAMES.ignored, "lm_head.", "embeddings.token_type_ids")
)


def facts(config: Mapping[str, Any]) -> dict[str, Any]:
    first_position = integer(config, "pad_token_id", 1, minimum=0) + 1
    num_positions = integer(config, "max_position_embeddings")
    if num_positions <= first_position:
        raise ConfigError(
            f"config.json: max_position_embeddings {num_positions} leaves no position for a token"
        )
    return {
        "names": NAMES,
        "max_len": num_positions - first_position,
        "first_position": first_position,
        "num_types": integer(config, "type_vocab_size", 1),
        "head": "dense",
    }
