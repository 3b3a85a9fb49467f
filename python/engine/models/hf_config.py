"""Read config.json as Hugging Face writes it, in old and new spellings, trusting nothing in it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from engine.errors import ConfigError
from engine.gguf_file import GGUFFile, is_gguf
from engine.models.gguf_config import config_of
from engine.models.spec import ModelSpec, RopeSpec
from engine.models.text_part import text_part

ROPE_KINDS = ("default", "linear", "llama3", "yarn", "longrope")
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
WINDOWED = "sliding_attention"
LAYER_TYPES = ("full_attention", WINDOWED)
DTYPES = ("float32", "float16", "bfloat16")
HEAD_DIMS = range(16, 257, 16)
MAX_INTEGER = 2**31 - 1
MAX_LAYERS = 4096
MAX_EXPERTS = 4096
MAX_NUMBER = 1e30


class FamilyDefaults(NamedTuple):
    """What a family's config.json means where it is silent; `has_layered_rope` is what it may say."""

    head_dim: int | None = None
    rope_theta: float = 10000.0
    ties_embeddings: bool = False
    has_layered_rope: bool = False


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file. Raises: `ConfigError` naming the file and its directory."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no {path.name} in {path.parent}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read {path.name} in {path.parent}: {_one_line(error)}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path.name} in {path.parent} must hold a JSON object")
    return value


def read_config(path: str | Path) -> dict[str, Any]:
    """The config.json of a checkpoint directory, or what a GGUF file says instead; that of the part for text
    where there are others. Raises: `ConfigError`."""
    if not is_gguf(path):
        return text_part(read_json(Path(path) / "config.json"))
    return config_of(GGUFFile(path))


def integer(
    config: Mapping[str, Any],
    key: str,
    default: int | None = None,
    *,
    minimum: int = 1,
    maximum: int = MAX_INTEGER,
    file: str = "config.json",
) -> int:
    """An integer of config.json, or of another file; null counts as absent.

    Raises: `ConfigError` naming the key.
    """
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"{file} lacks {key}")
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        expected = f"an integer from {minimum} to {maximum}"
        raise ConfigError(f"{file}: {key} must be {expected}, got {value!r:.80}")
    return value


def number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive number of config.json; null counts as absent. Raises: `ConfigError` naming the key."""
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"config.json lacks {key}")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= MAX_NUMBER:
        raise ConfigError(f"config.json: {key} must be a positive number, got {value!r:.80}")
    return float(value)


def flag(config: Mapping[str, Any], key: str, default: bool = False, *, file: str = "config.json") -> bool:
    """A boolean of config.json, or of another file; null counts as absent.

    Raises: `ConfigError` naming the key.
    """
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ConfigError(f"{file}: {key} must be true or false, got {value!r:.80}")
    return value


def read_facts(
    config: Mapping[str, Any], generation: Mapping[str, Any], defaults: FamilyDefaults
) -> dict[str, Any]:
    """Fields of `ModelSpec` that every family writes the same way, and flags that a family may replace."""
    hidden_size = integer(config, "hidden_size")
    num_layers = integer(config, "num_hidden_layers", maximum=MAX_LAYERS)
    num_heads = integer(config, "num_attention_heads")
    head_dim = integer(config, "head_dim", defaults.head_dim or hidden_size // num_heads)
    max_positions = integer(config, "max_position_embeddings")
    parameters = rope_parameters(config, is_layered=defaults.has_layered_rope)
    rope = read_rope(config, parameters, head_dim, max_positions, defaults.rope_theta)
    if rope.kind == "yarn":
        max_positions = max(max_positions, int(rope.original_max_positions * rope.factor))
    vocab_size = integer(config, "vocab_size")
    return {
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": integer(config, "num_key_value_heads", num_heads),
        "head_dim": head_dim,
        "intermediate_size": integer(config, "intermediate_size"),
        "vocab_size": vocab_size,
        "rms_norm_eps": number(config, "rms_norm_eps", 1e-6),
        "ropes": (rope,) * num_layers,
        "windows": (0,) * num_layers,
        "activation": _activation(config),
        "tie_word_embeddings": flag(config, "tie_word_embeddings", defaults.ties_embeddings),
        "qkv_bias": False,
        "output_bias": False,
        "mlp_bias": False,
        "qk_norm": "none",
        "max_position_embeddings": max_positions,
        "eos_token_ids": eos_token_ids(config, generation, vocab_size),
        "dtype": dtype_of(config),
        "attention_scale": head_dim**-0.5,
    }


def rope_parameters(
    config: Mapping[str, Any], layer_type: str = "full_attention", *, is_layered: bool = False
) -> Mapping[str, Any]:
    """`rope_parameters` (new) or `rope_scaling` (old); where `is_layered`, those of one type of layer."""
    layered = config.get("rope_parameters")
    if is_layered and isinstance(layered, Mapping) and layered and layered.keys() <= set(LAYER_TYPES):
        config = {"rope_parameters": layered.get(layer_type)}
    elif is_layered and layer_type == WINDOWED:
        config = {}  # the old spelling scales only the layers without a window
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping) or any(isinstance(item, Mapping) for item in parameters.values()):
        raise ConfigError("config.json: rope parameters must be one flat object for all layers")
    return parameters


def read_rope(
    config: Mapping[str, Any],
    parameters: Mapping[str, Any],
    head_dim: int,
    max_positions: int,
    default_theta: float,
) -> RopeSpec:
    """Rotary facts from their object in config.json; what that lacks is read from config.json itself."""
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if "short_factor" in parameters:
        kind = "longrope"  # which early files call "su" or "yarn"
    if kind not in ROPE_KINDS:
        raise ConfigError(f"rope scaling {kind!r:.80} is not supported; supported: {', '.join(ROPE_KINDS)}")
    share = number(parameters, "partial_rotary_factor", number(config, "partial_rotary_factor", 1.0))
    rotary_dim = int(head_dim * share)
    if share > 1 or rotary_dim < 2 or rotary_dim % 2:
        raise ConfigError(
            f"config.json: partial_rotary_factor {share:g} of head_dim {head_dim} is no even size"
        )
    theta = number(parameters, "rope_theta", number(config, "rope_theta", default_theta))
    if theta <= 1:
        raise ConfigError(f"config.json: rope_theta must be above 1, got {theta:g}")
    facts: dict[str, Any] = {"kind": kind, "theta": theta, "rotary_dim": rotary_dim}
    if kind == "default":
        return RopeSpec(**facts)
    if kind == "longrope":
        return RopeSpec(**facts, **_longrope_facts(config, parameters, rotary_dim, max_positions))
    facts["factor"] = factor = number(parameters, "factor")
    if kind == "linear":
        return RopeSpec(**facts)
    original = integer(parameters, "original_max_position_embeddings", max_positions)
    facts["original_max_positions"] = integer(config, "original_max_position_embeddings", original)
    if kind == "llama3":
        low, high = number(parameters, "low_freq_factor"), number(parameters, "high_freq_factor")
        if high <= low:
            raise ConfigError(f"config.json: high_freq_factor {high:g} must be above low_freq_factor {low:g}")
        return RopeSpec(**facts, low_freq_factor=low, high_freq_factor=high)
    return RopeSpec(
        **facts,
        beta_fast=number(parameters, "beta_fast", 32.0),
        beta_slow=number(parameters, "beta_slow", 1.0),
        attention_factor=_yarn_attention_factor(parameters, factor),
        truncate=flag(parameters, "truncate", True),
    )


def _longrope_facts(
    config: Mapping[str, Any], parameters: Mapping[str, Any], rotary_dim: int, max_positions: int
) -> dict[str, Any]:
    original = integer(parameters, "original_max_position_embeddings", max_positions, minimum=2)
    original = integer(config, "original_max_position_embeddings", original, minimum=2)
    factor = number(parameters, "factor", max_positions / original)
    default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {
        "original_max_positions": original,
        "attention_factor": number(parameters, "attention_factor", default),
        "short_factors": _factors(parameters, "short_factor", rotary_dim // 2),
        "long_factors": _factors(parameters, "long_factor", rotary_dim // 2),
    }


def _factors(parameters: Mapping[str, Any], key: str, count: int) -> tuple[float, ...]:
    values = parameters.get(key)
    if not isinstance(values, list) or len(values) != count:
        raise ConfigError(f"config.json: {key} must be a list of {count} positive numbers")
    return tuple(number({key: value}, key) for value in values)


def _yarn_attention_factor(parameters: Mapping[str, Any], factor: float) -> float:
    """What cos and sin are multiplied by. `mscale` and `mscale_all_dim` count only together."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if parameters.get("attention_factor") is not None:
        return number(parameters, "attention_factor")
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return mscale(number(parameters, "mscale")) / mscale(number(parameters, "mscale_all_dim"))
    return mscale(1.0)


def layer_windows(config: Mapping[str, Any], num_layers: int, window: int) -> tuple[int, ...] | None:
    """The window of each layer after `layer_types`, 0 for none; None when config.json has no such list."""
    layer_types = config.get("layer_types")
    if layer_types is None:
        return None
    if not isinstance(layer_types, list) or any(kind not in LAYER_TYPES for kind in layer_types):
        raise ConfigError(
            f"config.json: layer_types may name {' and '.join(LAYER_TYPES)}, got {layer_types!r:.80}"
        )
    if len(layer_types) != num_layers:
        raise ConfigError(f"layer_types has {len(layer_types)} entries for {num_layers} layers")
    return tuple(window if kind == WINDOWED else 0 for kind in layer_types)


def _activation(config: Mapping[str, Any]) -> str:
    name = config.get("hidden_activation") or config.get("hidden_act") or "silu"
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ConfigError(f"activation {name!r:.80} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def dtype_of(config: Mapping[str, Any]) -> str:
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    if name not in DTYPES:
        raise ConfigError(f"checkpoint dtype {name!r:.80} is not supported; supported: {', '.join(DTYPES)}")
    return name


def eos_token_ids(
    config: Mapping[str, Any], generation: Mapping[str, Any], vocab_size: int
) -> tuple[int, ...]:
    """The tokens that end an answer; those beyond the vocabulary are never drawn. Raises: `ConfigError`."""
    source = generation if generation.get("eos_token_id") is not None else config
    return tuple(i for i in _token_ids(source, "eos_token_id") if i < vocab_size)


def _token_ids(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = config.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in ids):
        raise ConfigError(f"{key} must be a token id or a list of token ids, got {value!r:.80}")
    return tuple(ids)


def check_supported(spec: ModelSpec) -> None:
    """Raises: `ConfigError` where the kernels or the facts themselves do not fit together."""
    if spec.head_dim not in HEAD_DIMS:
        raise ConfigError(f"head_dim {spec.head_dim} is not supported; supported: 16 to 256 in steps of 16")
    if spec.num_heads % spec.num_kv_heads:
        raise ConfigError(
            f"{spec.num_heads} query heads do not divide into {spec.num_kv_heads} key-value heads"
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
