"""DistilBERT: BERT without token types, with names of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.models.encoder_spec import EncoderNames, activation_of
from engine.models.hf_config import integer

NAMES = EncoderNames(
    prefix="distilbert.",
    words="embeddings.word_embeddings",
    positions="embeddings.position_embeddings",
    types=None,
    embedding_norm="embeddings.LayerNorm",
    layer="transformer.layer.{}.",
    qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    attention_output="attention.out_lin",
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    mlp_norm="output_layer_norm",
    ignored=("embeddings.position_ids", "vocab_", "pre_classifier.", "classifier."),
)


def facts(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "names": NAMES,
        "hidden_size": integer(config, "dim", 768),
        "num_layers": integer(config, "n_layers", 6),
        "num_heads": integer(config, "n_heads", 12),
        "intermediate_size": integer(config, "hidden_dim", 3072),
        "max_len": integer(config, "max_position_embeddings", 512),
        "activation": activation_of(config, "activation", "gelu"),
        "norm_eps": 1e-12,
        "head": "pre_classifier",
    }
