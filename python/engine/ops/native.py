"""All native ops under one name; `engine.ops.reference` has the same names and arguments."""

from __future__ import annotations

from engine._native import ExecutionContext
from engine.ops.append_kv import append_kv
from engine.ops.clamped_swiglu import clamped_swiglu
from engine.ops.embedding import embedding
from engine.ops.gated import activate, erf_gelu_mul, gated_linear, gated_mlp, gelu_mul, silu_mul
from engine.ops.layer_norm import layer_norm
from engine.ops.linear import PackedMatrix, linear
from engine.ops.lora import LoraAdapter, LoraPlan, lora, lora_embedding
from engine.ops.paged_attention import paged_attention
from engine.ops.pool import pool
from engine.ops.rms_norm import add_rms_norm, rms_norm
from engine.ops.rope import rope, rope_append_kv
from engine.ops.sampling import sample, score_tokens
from engine.ops.softcap import softcap

__all__ = [
    "ExecutionContext",
    "LoraAdapter",
    "LoraPlan",
    "PackedMatrix",
    "activate",
    "add_rms_norm",
    "append_kv",
    "clamped_swiglu",
    "embedding",
    "erf_gelu_mul",
    "gated_linear",
    "gated_mlp",
    "gelu_mul",
    "layer_norm",
    "linear",
    "lora",
    "lora_embedding",
    "paged_attention",
    "pool",
    "rms_norm",
    "rope",
    "rope_append_kv",
    "sample",
    "score_tokens",
    "silu_mul",
    "softcap",
]
