"""What GGUF files call tensors, and which of them stay in few bits. No torch here.

Source: gguf-py/gguf/tensor_mapping.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from engine.gguf_file import GGUFFile
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
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_OUR_LAYER = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")


def gguf_formats(file: GGUFFile) -> dict[str, StoredFormat]:
    """The matrices that are stored in few bits and stay so, by our names without ".weight"."""
    ours = {theirs: name for name, theirs in _LAYER_NAMES.items()}
    plain = {theirs: name for name, theirs in _NAMES.items()}
    formats = {}
    for name, info in file.tensors.items():
        if info.type.name not in STORED:
            continue
        match = _OUR_LAYER.fullmatch(name)
        if match and match[2] in ours:
            formats[f"model.layers.{match[1]}.{ours[match[2]]}"] = STORED[info.type.name]
        elif (stem := name.removesuffix(".weight")) in plain:
            formats[plain[stem]] = STORED[info.type.name]
    return formats


def gguf_name(name: str) -> str:
    """What llama.cpp calls a tensor."""
    match = _LAYER.fullmatch(name)
    if match and match[2] in _LAYER_NAMES:
        return f"blk.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"
    stem, _, kind = name.rpartition(".")
    return f"{_NAMES.get(stem, stem)}.{kind}"
