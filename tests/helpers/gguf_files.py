"""GGUF files of transformers models, written as llama.cpp's converter does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
from gguf import GGMLQuantizationType, GGUFValueType

from helpers.tokenizers import byte_level_tokenizer

LAYER_NAMES = {
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
PLAIN_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in PLAIN_NAMES:
        return f"{PLAIN_NAMES[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[rest]}.{kind}"


def side_by_side(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Query or key rows of the llama architecture as llama.cpp wants them: rows that rotate together,
    half a head apart in Hugging Face's checkpoints, become neighbours."""
    heads = rows.reshape(num_heads, 2, len(rows) // num_heads // 2, *rows.shape[1:])
    return heads.swapaxes(1, 2).reshape(rows.shape)


def encode(values: np.ndarray, kind: str) -> np.ndarray:
    """The bytes of a tensor as one of GGUF's types. The package has no encoder for Q4_K and Q6_K: theirs are
    random, with scales that make weights of a usual size."""
    if kind in ("F32", "F16"):
        return values.astype({"F32": np.float32, "F16": np.float16}[kind])
    if kind in ("Q4_K", "Q6_K"):
        return random_blocks(values.shape, kind, float(values.std()))
    return gguf.quants.quantize(values, GGMLQuantizationType[kind])


def random_blocks(shape: tuple[int, ...], kind: str, std: float = 0.05) -> np.ndarray:
    """Every code and every scale, in blocks whose half-precision factors are finite."""
    generator = np.random.default_rng(sum(shape))
    block_len, block_bytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = generator.integers(256, size=(*shape[:-1], shape[-1] // block_len, block_bytes), dtype=np.uint8)
    factors = {"Q4_K": (0, 2), "Q6_K": (208,), "Q4_1": (0, 2)}.get(kind, (0,))
    for at in factors:
        # Of Q4_K both factors are meant to be positive: minima are what is taken away.
        scale = std / {"Q4_K": 200, "Q6_K": 1200, "Q8_0": 74}.get(kind, 5)
        factor = generator.uniform(0.5, 1.5, (*blocks.shape[:-1], 1)) * scale * (7.5 if at else 1)
        blocks[..., at : at + 2] = factor.astype(np.float16).view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def decode(data: np.ndarray, kind: str) -> np.ndarray:
    """What the package makes of it, float32."""
    return np.array(gguf.quants.dequantize(data, GGMLQuantizationType[kind]), np.float32)


def write_gguf(
    path: Path,
    model,
    kind_of: Callable[[str], str] = lambda name: "F32",
    *,
    architecture: str | None = None,
    tokenizer: tokenizers.Tokenizer | None = None,
    pre: str = "gpt-2",
    metadata: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write a transformers model; matrices (not norms and biases) get the type that `kind_of` their GGUF name
    says, and the model gets the numbers that they stand for."""
    config = model.config
    architecture = architecture or config.model_type
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    add_tokenizer(writer, tokenizer, pre)
    for key, value in (metadata or {}).items():
        add_value(writer, key, value)
    tied = config.tie_word_embeddings
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if tied and name == "lm_head.weight":
                continue
            _add_tensor(writer, architecture, config, name, parameter, kind_of)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tensor(writer, architecture: str, config, name: str, parameter: torch.Tensor, kind_of) -> None:
    theirs = gguf_name(name)
    values = parameter.float().numpy()
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    num_heads = heads.get(name.split(".")[-2]) if architecture == "llama" else None
    kind = kind_of(theirs) if values.ndim == 2 else "F32"
    data = encode(values if num_heads is None else side_by_side(values, num_heads), kind)
    writer.add_tensor(theirs, data, raw_dtype=GGMLQuantizationType[kind])
    decoded = decode(data, kind).reshape(values.shape)
    if num_heads is not None:  # the inverse: what was put side by side goes half a head apart
        pairs = decoded.reshape(num_heads, len(decoded) // num_heads // 2, 2, *decoded.shape[1:])
        decoded = pairs.swapaxes(1, 2).reshape(decoded.shape)
    parameter.copy_(torch.from_numpy(np.ascontiguousarray(decoded)))


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kind = GGUFValueType.get_type(value)
    sub_type = GGUFValueType.get_type(value[0]) if kind == GGUFValueType.ARRAY else None
    writer.add_key_value(key, value, kind, sub_type)


def add_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: tokenizers.Tokenizer | None, pre: str = "gpt-2"
) -> None:
    """A byte-level BPE tokenizer; None writes a small one."""
    if tokenizer is None:
        tokenizer = byte_level_tokenizer()
    spelled = {i: token for token, i in tokenizer.get_vocab().items()}
    added = tokenizer.get_added_tokens_decoder()
    kinds = {
        i: gguf.TokenType.CONTROL if t.special else gguf.TokenType.USER_DEFINED for i, t in added.items()
    }
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([spelled[i] for i in range(len(spelled))])
    writer.add_token_types([kinds.get(i, gguf.TokenType.NORMAL) for i in range(len(spelled))])
    if merges:
        writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(2)
