"""ModernBERT: rotary positions, windows in most layers, gated MLP, norms before each block, few biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import ConfigError
from engine.models.encoder_spec import EncoderNames, activation_of
from engine.models.hf_config import LAYER_TYPES, WINDOWED, flag, integer, number

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
GATED = ("gelu", "gelu_tanh", "silu")
_UNUSUAL = ("attention_bias", "mlp_bias", "norm_bias")


def facts(config: Mapping[str, Any]) -> dict[str, Any]:
    for name in _UNUSUAL:
        if flag(config, name):
            raise ConfigError(f"config.json: {name} true is not supported")
    activation = activation_of(config, "hidden_activation", "gelu")
    if activation not in GATED:
        raise ConfigError(f"config.json: hidden_activation {activation} is not supported for ModernBERT")
    num_layers = integer(config, "num_hidden_layers", 22)
    is_global = _global_layers(config, num_layers)
    thetas = _thetas(config)
    window = integer(config, "local_attention", 128) // 2 + 1
    return {
        "names": NAMES,
        "num_layers": num_layers,
        "max_len": integer(config, "max_position_embeddings"),
        "activation": activation,
        "norm_eps": number(config, "norm_eps", 1e-5),
        "is_gated": True,
        "is_pre_norm": True,
        "has_bias": False,
        "has_norm_bias": False,
        "windows": tuple(0 if is_all else window for is_all in is_global),
        "rope_thetas": tuple(thetas[0] if is_all else thetas[1] for is_all in is_global),
        "head": "modern",
        "head_activation": activation_of(config, "classifier_activation", "gelu"),
        "has_head_bias": flag(config, "classifier_bias"),
        "label_pooling": _label_pooling(config),
    }


def _label_pooling(config: Mapping[str, Any]) -> str:
    mode = config.get("classifier_pooling") or "cls"
    if mode not in ("cls", "mean"):
        raise ConfigError(f"config.json: classifier_pooling must be cls or mean, got {mode!r:.80}")
    return mode


def _global_layers(config: Mapping[str, Any], num_layers: int) -> list[bool]:
    kinds = config.get("layer_types")
    if kinds is None:
        every = integer(config, "global_attn_every_n_layers", 3)
        return [layer % every == 0 for layer in range(num_layers)]
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(k not in LAYER_TYPES for k in kinds):
        raise ConfigError(f"config.json: layer_types must name {' or '.join(LAYER_TYPES)} for each layer")
    return [kind == "full_attention" for kind in kinds]


def _thetas(config: Mapping[str, Any]) -> tuple[float, float]:
    """Of layers that see all, and of those with a window; in the new spelling by kind of layer."""
    if config.get("rope_scaling"):
        raise ConfigError("config.json: rope_scaling is not supported for ModernBERT")
    parameters = config.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping) or not parameters.keys() <= set(LAYER_TYPES):
        raise ConfigError(f"config.json: rope_parameters must have {' and '.join(LAYER_TYPES)}")
    whole = _theta(parameters.get("full_attention"), number(config, "global_rope_theta", 160000.0))
    return whole, _theta(parameters.get(WINDOWED), number(config, "local_rope_theta", 10000.0))


def _theta(parameters: Any, default: float) -> float:
    parameters = parameters or {}
    if not isinstance(parameters, Mapping) or parameters.get("rope_type") not in (None, "default"):
        raise ConfigError(f"config.json: rope parameters {parameters!r:.80} are not supported for ModernBERT")
    if parameters.get("partial_rotary_factor") not in (None, 1):
        raise ConfigError("config.json: partial_rotary_factor is not supported for ModernBERT")
    return number(parameters, "rope_theta", default)
