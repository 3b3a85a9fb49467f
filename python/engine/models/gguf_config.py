"""The config.json that a GGUF file stands for. No torch here.

Source: the GGUF specification, and what llama.cpp's convert_hf_to_gguf.py makes of each architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from engine.errors import ConfigError
from engine.gguf_file import GGUFFile
from engine.text.gguf_tokenizer import end_token_ids

_ROPE_FACTORS = "rope_freqs.weight"
_SHORT_FACTORS, _LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"  # of LongRoPE
_POOLINGS = MappingProxyType({0: None, 1: "mean", 2: "cls", 3: "last"})
_ROUTER = ".ffn_gate_inp."


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
    if "token_embd.weight" not in file.tensors:
        raise file.error("lacks token_embd.weight")
    heads = _fact(file, "attention.head_count")
    hidden_size = _fact(file, "embedding_length")
    _check_sizes(file, {"attention.head_count": heads, "embedding_length": hidden_size})
    head_dim = _fact(file, "attention.key_length", hidden_size // heads)
    rotary = _fact(file, "rope.dimension_count", head_dim)
    _check_sizes(file, {"attention.key_length": head_dim, "rope.dimension_count": rotary})
    if rotary != head_dim and file.architecture != "phi3":
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
        "partial_rotary_factor": rotary / head_dim,
        **architecture.facts(file),
    }


def _check_sizes(file: GGUFFile, sizes: Mapping[str, Any]) -> None:
    for key, value in sizes.items():
        if type(value) is not int or value < 1:
            raise file.error(f"has {value!r:.80} for {key}")


def gguf_pooling(file: GGUFFile) -> str | None:
    """How a model that embeds pools, None for one that does not. Raises: `CheckpointError`."""
    kind = file.metadata.get(f"{file.architecture}.pooling_type", 0)
    if type(kind) is not int or kind not in _POOLINGS:
        known = ", ".join(f"{number} ({name})" for number, name in _POOLINGS.items() if name)
        raise file.error(f"has {kind!r:.80} for pooling_type, which is not supported; supported: {known}")
    return _POOLINGS[kind]


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
    tensors = file.tensors.values()
    names = {i.type.name for i in tensors if len(i.shape) > 1 and _ROUTER not in i.name}  # always F32
    return "float32" if "F32" in names else "float16" if "F16" in names else "bfloat16"


def _numbers(file: GGUFFile, name: str) -> list[float]:
    """Of a tensor that is a part of the configuration."""
    info = file.tensors[name]
    if info.type.name != "F32":
        raise file.error(f"has {name} as {info.type.name}, expected F32")
    return [float(value) for value in file.read(info).view(np.float32)]


def _rope_scaling(file: GGUFFile, context_length: int) -> dict[str, Any] | None:
    if _ROPE_FACTORS in file.tensors:
        # Llama 3.1's scaling comes as one factor for each frequency.
        factors = _numbers(file, _ROPE_FACTORS)
        scaling = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}
        return {**scaling, "attention_factor": 1.0, "original_max_position_embeddings": context_length}
    kind = _fact(file, "rope.scaling.type", "none")
    if kind == "none" or _LONG_FACTORS in file.tensors:
        return None
    if kind not in ("linear", "yarn"):
        raise file.error(f"rope scaling {kind!r:.80} is not supported; supported: linear, yarn")
    scaling = {"rope_type": kind, "factor": _fact(file, "rope.scaling.factor")}
    if kind == "yarn":
        original = _fact(file, "rope.scaling.original_context_length", context_length)
        scaling["original_max_position_embeddings"] = original
    return scaling


def _biases(file: GGUFFile) -> dict[str, Any]:
    has_bias = "blk.0.attn_q.bias" in file.tensors
    if has_bias != ("blk.0.attn_output.bias" in file.tensors):
        raise file.error("has biases of attention, but not of all four projections")
    return {"attention_bias": has_bias, "mlp_bias": "blk.0.ffn_down.bias" in file.tensors}


def _llama(file: GGUFFile) -> dict[str, Any]:
    """Mixtral, too, comes by this name."""
    if not (num_experts := _fact(file, "expert_count", 0)):
        return _biases(file)
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": num_experts,
        "num_experts_per_tok": _fact(file, "expert_used_count"),
    }


def _qwen3_moe(file: GGUFFile) -> dict[str, Any]:
    return {
        "num_experts": _fact(file, "expert_count"),
        "num_experts_per_tok": _fact(file, "expert_used_count"),
        "moe_intermediate_size": _fact(file, "expert_feed_forward_length"),
        "norm_topk_prob": True,  # as llama.cpp takes it, without a word in the file
    }


def _granite(file: GGUFFile) -> dict[str, Any]:
    return {
        **_biases(file),
        "attention_multiplier": _fact(file, "attention.scale", 1.0),
        "embedding_multiplier": _fact(file, "embedding_scale", 1.0),
        "residual_multiplier": _fact(file, "residual_scale", 1.0),
        "logits_scaling": _fact(file, "logit_scale", 1.0),
    }


def _gemma(file: GGUFFile, num_layers_27b: int) -> dict[str, Any]:
    """Scores of the 27-billion sizes are scaled by another number, which no file says, as llama.cpp knows."""
    scalar = _fact(file, "attention.key_length")
    if _fact(file, "block_count") == num_layers_27b:
        scalar = _fact(file, "embedding_length") / _fact(file, "attention.head_count")
    return {
        "sliding_window": _fact(file, "attention.sliding_window"),
        "query_pre_attn_scalar": scalar,
        "attn_logit_softcapping": _fact(file, "attn_logit_softcapping", 0) or None,
        "final_logit_softcapping": _fact(file, "final_logit_softcapping", 0) or None,
    }


def _gemma2(file: GGUFFile) -> dict[str, Any]:
    return _gemma(file, 46)


def _gemma3(file: GGUFFile) -> dict[str, Any]:
    return {**_gemma(file, 62), "rope_local_base_freq": _fact(file, "rope.freq_base_swa", 10000.0)}


def _phi3(file: GGUFFile) -> dict[str, Any]:
    facts: dict[str, Any] = {"sliding_window": _fact(file, "attention.sliding_window", 0) or None}
    if _LONG_FACTORS not in file.tensors:
        return facts
    original = _fact(file, "rope.scaling.original_context_length")
    scaling = {
        "rope_type": "longrope",
        "short_factor": _numbers(file, _SHORT_FACTORS),
        "long_factor": _numbers(file, _LONG_FACTORS),
        "attention_factor": _fact(file, "rope.scaling.attn_factor", 1.0),
        "original_max_position_embeddings": original,
    }
    return {**facts, "rope_scaling": scaling}


def _olmo2(file: GGUFFile) -> dict[str, Any]:
    if _fact(file, "attention.sliding_window", 0):
        raise file.error("has windows (OLMo 3), which are not supported in GGUF files")
    return {"attention_bias": False}


def _no_more(file: GGUFFile) -> dict[str, Any]:
    return {}


_ARCHITECTURES: Mapping[str, _Architecture] = {
    "gemma2": _Architecture("Gemma2ForCausalLM", "gemma2", _gemma2),
    "gemma3": _Architecture("Gemma3ForCausalLM", "gemma3_text", _gemma3),
    "granite": _Architecture("GraniteForCausalLM", "granite", _granite),
    "llama": _Architecture("LlamaForCausalLM", "llama", _llama),
    "olmo2": _Architecture("Olmo2ForCausalLM", "olmo2", _olmo2),
    "phi3": _Architecture("Phi3ForCausalLM", "phi3", _phi3),
    "qwen2": _Architecture("Qwen2ForCausalLM", "qwen2", _no_more),
    "qwen3": _Architecture("Qwen3ForCausalLM", "qwen3", _no_more),
    "qwen3moe": _Architecture("Qwen3MoeForCausalLM", "qwen3_moe", _qwen3_moe),
    "smollm3": _Architecture("SmolLM3ForCausalLM", "smollm3", _biases),
}
