"""GGUF files of transformers models, written as llama.cpp's converter does."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
from gguf import GGMLQuantizationType, GGUFValueType

from helpers.tokenizers import byte_level_tokenizer

ARCHITECTURES = {"gemma3_text": "gemma3", "mistral": "llama", "mixtral": "llama", "qwen3_moe": "qwen3moe"}
"""Where llama.cpp has another name than transformers' model_type."""
SIDE_BY_SIDE = ("llama", "granite", "smollm3")


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
    tensors_a_part: int = 0,
) -> Path:
    """Write a transformers model; matrices (not norms and biases) get the type that `kind_of` their GGUF name
    says, and the model gets the numbers that they stand for. Returns the file; the first one if it is cut
    into parts of `tensors_a_part`."""
    config = model.config
    kind = ARCHITECTURES.get(config.model_type, config.model_type)
    architecture = architecture or kind
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=tensors_a_part)
    _add_facts(writer, config)
    add_tokenizer(writer, tokenizer, pre)
    for key, value in (metadata or {}).items():
        add_value(writer, key, value)
    tied = config.tie_word_embeddings
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not (tied and name == "lm_head.weight"):
                for theirs, part in _tensors(kind, config.num_hidden_layers, name, parameter):
                    _add_tensor(writer, kind, config, theirs, part, kind_of)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return next(path.parent.glob(f"{path.stem}-00001-of-*.gguf")) if tensors_a_part else path


def _add_facts(writer: gguf.GGUFWriter, config) -> None:
    """As the converter does for each architecture, but for what is not written where it is the default."""
    rope = config.rope_parameters
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_key_length(head_dim)
    if config.model_type in ("gemma2", "gemma3_text", "phi3"):
        writer.add_sliding_window(config.sliding_window or 0)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.model_type == "gemma3_text":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["full_attention"]["factor"])
    if config.model_type == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if config.model_type == "phi3":
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1)))
        if rope["rope_type"] == "longrope":
            original = rope["original_max_position_embeddings"]
            factor = config.max_position_embeddings / original
            writer.add_rope_scaling_orig_ctx_len(original)
            writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(factor) / math.log(original)))
            for length in ("long", "short"):
                factors = np.array(rope[f"{length}_factor"], np.float32)
                writer.add_tensor(f"rope_factors_{length}.weight", factors)
    if config.model_type in ("mixtral", "qwen3_moe"):
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if config.model_type == "qwen3_moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _tensors(
    kind: str, num_layers: int, name: str, parameter: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """A parameter by the name that the package gives it; gate and up of experts are two tensors there."""
    (arch,) = (arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == kind)
    names = gguf.get_tensor_name_map(arch, num_layers)
    if name.endswith("experts.gate_up_proj"):
        for part, values in zip(("gate", "up"), parameter.chunk(2, dim=1), strict=True):
            yield f"blk.{name.split('.')[2]}.ffn_{part}_exps.weight", values
        return
    theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert theirs is not None, name
    yield theirs if theirs.endswith((".weight", ".bias")) else f"{theirs}.weight", parameter


def _add_tensor(writer, architecture: str, config, theirs: str, parameter: torch.Tensor, kind_of) -> None:
    values = parameter.float().numpy()
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    num_heads = heads.get(theirs.split(".")[-2]) if architecture in SIDE_BY_SIDE else None
    offset = float(architecture.startswith("gemma") and theirs.endswith("norm.weight"))
    kind = kind_of(theirs) if values.ndim > 1 and "ffn_gate_inp" not in theirs else "F32"
    values = values + offset if num_heads is None else side_by_side(values, num_heads)
    data = encode(np.ascontiguousarray(values), kind)
    writer.add_tensor(theirs, data, raw_dtype=GGMLQuantizationType[kind])
    decoded = decode(data, kind).reshape(values.shape) - offset
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
