"""BERT: learned positions, token types, norms after each block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.models.encoder_spec import EncoderNames
from engine.models.hf_config import integer

NAMES = EncoderNames(
    prefix="bert.",
    words="embeddings.word_embeddings",
    positions="embeddings.position_embeddings",
    types="embeddings.token_type_embeddings",
    embedding_norm="embeddings.LayerNorm",
    layer="encoder.layer.{}.",
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    attention_output="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    mlp_norm="output.LayerNorm",
    ignored=("embeddings.position_ids", "pooler.", "cls.", "classifier."),
)


def facts(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "names": NAMES,
        "max_len": integer(config, "max_position_embeddings"),
        "num_types": integer(config, "type_vocab_size", 2),
        "head": "pooler",
    }
