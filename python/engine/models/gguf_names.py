"""What GGUF files call tensors, and which of them stay in few bits. No torch here.

Source: gguf-py/gguf/tensor_mapping.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from engine.gguf_file import GGUFFile, TensorInfo
from engine.models.spec import StoredFormat

STORED: Mapping[str, StoredFormat] = MappingProxyType(
    {
        "Q8_0": StoredFormat("int8", 32),
        "Q4_0": StoredFormat("int4", 32),
        "Q4_1": StoredFormat("int4_affine", 32),
        "Q4_K": StoredFormat("int4_affine", 32),
    }
)
"""Types of tensors that a packed matrix can hold as they are."""

_NAMES = MappingProxyType(
    {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
)
_LAYER_NAMES = MappingProxyType(
    {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
)
_NORMS_AFTER = MappingProxyType(
    {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    }
)
_OWN_LAYER_NAMES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "gemma2": _NORMS_AFTER,
        "gemma3": _NORMS_AFTER,
        "llama": {
            "block_sparse_moe.gate": "ffn_gate_inp",
            "block_sparse_moe.experts.{}.w1": "ffn_gate_exps",
            "block_sparse_moe.experts.{}.w3": "ffn_up_exps",
            "block_sparse_moe.experts.{}.w2": "ffn_down_exps",
        },
        "olmo2": _NORMS_AFTER,
        "phi3": {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"},
        "qwen3moe": {
            "mlp.gate": "ffn_gate_inp",
            "mlp.experts.{}.gate_proj": "ffn_gate_exps",
            "mlp.experts.{}.up_proj": "ffn_up_exps",
            "mlp.experts.{}.down_proj": "ffn_down_exps",
        },
    }
)
"""What an architecture has besides the names above, or in their place; {} stands for an expert."""
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_EXPERT = re.compile(r"(?<=\.experts\.)\d+")
_OUR_LAYER = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")


class GGUFName(NamedTuple):
    """What llama.cpp calls a tensor; those of all experts are one, of which it is the part `expert`."""

    name: str
    expert: int | None = None


def gguf_formats(file: GGUFFile) -> dict[str, StoredFormat]:
    """The matrices that are stored in few bits and stay so, by our names without ".weight"."""
    table = _layer_names(file.architecture)
    ours = {theirs: name for name, theirs in table.items()}
    plain = {theirs: name for name, theirs in _NAMES.items()}
    return {
        name: STORED[info.type.name]
        for info in file.tensors.values()
        if info.type.name in STORED
        for name in _our_names(info, ours, plain)
    }


def largest_dequantized(file: GGUFFile) -> int:
    """Elements of the largest matrix that becomes floats while it is loaded; experts come one by one."""
    held = {*STORED, "F32", "F16", "BF16"}
    sizes = (math.prod(info.shape[-2:]) for info in file.tensors.values() if info.type.name not in held)
    return max(sizes, default=0)


def _our_names(info: TensorInfo, ours: Mapping[str, str], plain: Mapping[str, str]) -> Iterator[str]:
    match = _OUR_LAYER.fullmatch(info.name)
    if match and match[2] in ours:
        name = f"model.layers.{match[1]}.{ours[match[2]]}"
        yield from map(name.format, range(info.shape[0])) if "{}" in name else (name,)
    elif (stem := info.name.removesuffix(".weight")) in plain:
        yield plain[stem]


def gguf_name(architecture: str, name: str) -> GGUFName:
    """What a tensor of ours is there."""
    match = _LAYER.fullmatch(name)
    if match:
        expert = _EXPERT.search(match[2])
        theirs = _layer_names(architecture).get(_EXPERT.sub("{}", match[2]))
        if theirs is not None:
            return GGUFName(f"blk.{match[1]}.{theirs}.{match[3]}", int(expert[0]) if expert else None)
    stem, _, kind = name.rpartition(".")
    return GGUFName(f"{_NAMES.get(stem, stem)}.{kind}")


def _layer_names(architecture: str) -> Mapping[str, str]:
    return {**_LAYER_NAMES, **_OWN_LAYER_NAMES.get(architecture, {})}
