"""ModernBERT: rotary positions, windows in most layers, gated MLP, norms before each block, few biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import ConfigError
from engine.models.encoder_spec import EncoderNames, activation_of
from engine.models.hf_config import flag, integer, number

NAMES = EncoderNames(
    prefix="model.",
    words="embeddings.tok_embeddings",
    positions=None,
    types=None,
    embedding_norm="embeddings.norm",
    layer="layers.{}.",
    qkv=("attn.Wqkv",),
    attention_output="attn.Wo",
    attention_norm="attn_norm",
    up="mlp.Wi",
    down="mlp.Wo",
    mlp_norm="mlp_norm",
    final_norm="final_norm",
    ignored=("head.", "decoder.", "classifier."),
)
_UNUSUAL = ("attention_bias", "mlp_bias", "norm_bias")


def facts(config: Mapping[str, Any]) -> dict[str, Any]:
    for name in _UNUSUAL:
        if flag(config, name):
            raise ConfigError(f"config.json: {name} true is not supported")
    num_layers = integer(config, "num_hidden_layers", 22)
    is_global = _global_layers(config, num_layers)
    thetas = _thetas(config)
    window = integer(config, "local_attention", 128) // 2 + 1
    return {
        "names": NAMES,
        "num_layers": num_layers,
        "max_len": integer(config, "max_position_embeddings"),
        "activation": activation_of(config, "hidden_activation", "gelu"),
        "norm_eps": number(config, "norm_eps", 1e-5),
        "is_gated": True,
        "is_pre_norm": True,
        "has_bias": False,
        "has_norm_bias": False,
        "windows": tuple(0 if is_all else window for is_all in is_global),
        "rope_thetas": tuple(thetas[0] if is_all else thetas[1] for is_all in is_global),
        "head": "modern",
    }


def _global_layers(config: Mapping[str, Any], num_layers: int) -> list[bool]:
    kinds = config.get("layer_types")
    if kinds is None:
        every = integer(config, "global_attn_every_n_layers", 3)
        return [layer % every == 0 for layer in range(num_layers)]
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise ConfigError("config.json: layer_types must name a kind for each layer")
    return [kind == "full_attention" for kind in kinds]


def _thetas(config: Mapping[str, Any]) -> tuple[float, float]:
    """Of layers that see all, and of those with a window; in the new spelling by kind of layer."""
    parameters = config.get("rope_parameters")
    if isinstance(parameters, Mapping) and isinstance(parameters.get("full_attention"), Mapping):
        local = parameters.get("sliding_attention")
        whole = number(parameters["full_attention"], "rope_theta", 160000.0)
        return whole, number(local if isinstance(local, Mapping) else {}, "rope_theta", 10000.0)
    return number(config, "global_rope_theta", 160000.0), number(config, "local_rope_theta", 10000.0)
