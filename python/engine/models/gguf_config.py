"""The config.json that a GGUF file stands for. No torch here.

Source: the GGUF specification, and what llama.cpp's convert_hf_to_gguf.py makes of each architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from engine.errors import ConfigError
from engine.gguf_file import GGUFFile
from engine.text.gguf_tokenizer import end_token_ids

_ROPE_FACTORS = "rope_freqs.weight"


class _Architecture(NamedTuple):
    name: str
    model_type: str
    facts: Callable[[GGUFFile], dict[str, Any]]


def config_of(file: GGUFFile) -> dict[str, Any]:
    """An object like that of config.json. Raises: `ConfigError` that names what is missing or unsupported."""
    architecture = _ARCHITECTURES.get(file.architecture)
    if architecture is None:
        supported = ", ".join(_ARCHITECTURES)
        raise file.error(f"unsupported architecture: {file.architecture:.80}; supported: {supported}")
    if _fact(file, "expert_count", 0):
        raise file.error("mixtures of experts are not supported in GGUF files")
    if "token_embd.weight" not in file.tensors:
        raise file.error("lacks token_embd.weight")
    heads = _fact(file, "attention.head_count")
    hidden_size = _fact(file, "embedding_length")
    sizes = {"attention.head_count": heads, "embedding_length": hidden_size}
    for key, value in sizes.items():
        if type(value) is not int or value < 1:
            raise file.error(f"has {value!r:.80} for {key}")
    head_dim = _fact(file, "attention.key_length", hidden_size // heads)
    if (rotary := _fact(file, "rope.dimension_count", head_dim)) != head_dim:
        raise file.error(
            f"rotates {rotary!r:.20} of {head_dim!r:.20} dimensions of a head, which is not supported"
        )
    context_length = _fact(file, "context_length")
    return {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "dtype": _dtype(file),
        "hidden_size": hidden_size,
        "intermediate_size": _fact(file, "feed_forward_length"),
        "num_hidden_layers": _fact(file, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _fact(file, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": context_length,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "rms_norm_eps": _fact(file, "attention.layer_norm_rms_epsilon"),
        "rope_theta": _fact(file, "rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(file, context_length),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "eos_token_id": end_token_ids(file),
        **architecture.facts(file),
    }


def as_gguf_error(file: GGUFFile, error: ConfigError) -> ConfigError:
    """A complaint about the config.json that the file has not."""
    return file.error(error.message.replace("config.json: ", "").replace("config.json", "the file"))


def _fact(file: GGUFFile, key: str, default: Any = None) -> Any:
    name = f"{file.architecture}.{key}"
    value = file.metadata.get(name, default)
    if value is None:
        raise file.error(f"lacks {name}")
    if isinstance(value, list):
        raise file.error(f"has a list for {name}: layers of different sizes are not supported")
    return value


def _dtype(file: GGUFFile) -> str:
    """Of what is not in few bits: the widest type of a matrix; that of embeddings where all are in few."""
    names = {info.type.name for info in file.tensors.values() if len(info.shape) > 1}
    return "float32" if "F32" in names else "float16" if "F16" in names else "bfloat16"


def _rope_scaling(file: GGUFFile, context_length: int) -> dict[str, Any] | None:
    if _ROPE_FACTORS in file.tensors:
        # Llama 3.1's scaling comes as one factor for each frequency.
        info = file.tensors[_ROPE_FACTORS]
        if info.type.name != "F32":
            raise file.error(f"has {_ROPE_FACTORS} as {info.type.name}, expected F32")
        factors = [float(factor) for factor in file.read(info).view(np.float32)]
        scaling = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}
        return {**scaling, "attention_factor": 1.0, "original_max_position_embeddings": context_length}
    kind = _fact(file, "rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise file.error(f"rope scaling {kind!r:.80} is not supported; supported: linear, yarn")
    scaling = {"rope_type": kind, "factor": _fact(file, "rope.scaling.factor")}
    if kind == "yarn":
        original = _fact(file, "rope.scaling.original_context_length", context_length)
        scaling["original_max_position_embeddings"] = original
    return scaling


def _llama(file: GGUFFile) -> dict[str, Any]:
    has_bias = "blk.0.attn_q.bias" in file.tensors
    if has_bias != ("blk.0.attn_output.bias" in file.tensors):
        raise file.error("has biases of attention, but not of all four projections")
    return {"attention_bias": has_bias, "mlp_bias": "blk.0.ffn_down.bias" in file.tensors}


def _no_more(file: GGUFFile) -> dict[str, Any]:
    return {}


_ARCHITECTURES: Mapping[str, _Architecture] = {
    "llama": _Architecture("LlamaForCausalLM", "llama", _llama),
    "qwen2": _Architecture("Qwen2ForCausalLM", "qwen2", _no_more),
    "qwen3": _Architecture("Qwen3ForCausalLM", "qwen3", _no_more),
}
