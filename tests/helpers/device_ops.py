"""The ops of the CUDA backend with its conventions, made of references: a model on CPU tensors as on a GPU.

Keys lie as values do, activations have any dtype, the plan is a `DevicePlan`, a cache of fp8 has scales.
"""

from __future__ import annotations

import numpy as np
import torch

from engine import _native
from engine.ops import reference
from engine.ops.cuda.plan import DevicePlan, split_rows
from engine.ops.reference import (
    LoraAdapter,
    LoraPlan,
    PackedMatrix,
    activate,
    add_rms_norm,
    clamped_swiglu,
    embedding,
    erf_gelu_mul,
    gelu_mul,
    layer_norm,
    linear,
    lora,
    lora_embedding,
    pool,
    rms_norm,
    rope,
    silu_mul,
    softcap,
)
from engine.ops.sampling import SamplingTensors

__all__ = [
    "ExecutionContext",
    "ExpertMatrices",
    "LoraAdapter",
    "LoraPlan",
    "PackedMatrix",
    "activate",
    "add_rms_norm",
    "append_kv",
    "are_alike",
    "clamped_swiglu",
    "embedding",
    "erf_gelu_mul",
    "experts",
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

LARGEST_FP8 = 448.0


class ExecutionContext:
    """`lose` makes it one whose GPU is gone. Rounded attention is one of the CPU's kernels."""

    def __init__(
        self,
        num_threads: int = 1,
        isa: str = "auto",
        rounds_attention: bool = False,
        *,
        is_deterministic: bool = False,
    ) -> None:
        self.isa, self.num_threads, self.is_deterministic = "sm_00", num_threads, is_deterministic
        self.kernel_seconds = 0.0, 0.0
        self.is_lost = False
        self.native = _native.ExecutionContext(1)

    def report_to(self, board) -> None: ...


def append_kv(ctx, k, v, k_cache, v_cache, slot_ids, kv_scales=None) -> None:
    assert k_cache.shape == v_cache.shape, "keys lie as values do"
    if kv_scales is not None:
        block_size = v_cache.shape[2]
        blocks, offsets = slot_ids // block_size, slot_ids % block_size
        for which, (heads, cache) in enumerate(((k, k_cache), (v, v_cache))):
            scales = heads.float().abs().amax(-1) / LARGEST_FP8
            kv_scales[blocks, :, which, offsets] = scales
            codes = heads.float() / scales.clamp_min(1e-30)[..., None]
            cache.view(torch.uint8)[blocks, :, offsets] = codes.to(cache.dtype).view(torch.uint8)
        return
    reference.append_kv(ctx, k, v, k_cache.transpose(2, 3), v_cache, slot_ids)


def rope_append_kv(ctx, q, k, v, cos, sin, positions, k_cache, v_cache, slot_ids, kv_scales=None) -> None:
    rope(ctx, q, k, cos, sin, positions)
    append_kv(ctx, k, v, k_cache, v_cache, slot_ids, kv_scales)


def paged_attention(
    ctx, q, k_cache, v_cache, plan, scale, window, softcap, out, sinks=None, kv_scales=None
) -> None:
    check_plan(plan)
    if kv_scales is not None:
        k_cache, v_cache = k_cache.float(), v_cache.float()
    reference.paged_attention(
        ctx, q, k_cache.transpose(2, 3), v_cache, plan, scale, window, softcap, out, sinks, kv_scales
    )


def check_plan(plan) -> None:
    """The lists of work cover every query once, within the bounds that launches follow from."""
    assert isinstance(plan, DevicePlan)
    decode_rows, tiles = split_rows(plan.cu_seqlens_q.numpy(), is_causal=plan.is_causal)
    assert np.array_equal(plan.decode_rows.numpy(), decode_rows)
    assert np.array_equal(plan.tiles.numpy(), tiles)
    lens = plan.kv_lens
    assert lens.max() <= plan.max_kv_len
    assert len(decode_rows) == 0 or lens[plan.decode_rows.long()].max() <= plan.max_decode_kv_len


class ExpertMatrices:
    def __init__(self, matrices, biases) -> None:
        self.pairs = list(zip(matrices, biases, strict=True))


def are_alike(matrices) -> bool:
    return True


def experts(ctx, x, weights, expert_ids, gate_up, gate, down, out) -> None:
    results = torch.zeros(*expert_ids.shape, x.shape[1])
    for expert, ((up, up_bias), (back, back_bias)) in enumerate(zip(gate_up.pairs, down.pairs, strict=True)):
        rows, ranks = (expert_ids == expert).nonzero(as_tuple=True)
        inner = x.new_empty(len(rows), len(up.weight))
        product = x.new_empty(len(rows), back.weight.shape[1])
        result = torch.empty_like(x[rows])
        linear(ctx, x[rows], up, up_bias, inner)
        gate(inner, product)
        linear(ctx, product, back, back_bias, result)
        results[rows, ranks] = result.float()
    out.copy_((results * weights[:, :, None]).sum(1))


def sample(ctx, tensors: SamplingTensors) -> None:
    from engine.ops import sampling

    sampling.sample(ctx.native, tensors)


def score_tokens(ctx, *args) -> None:
    from engine.ops import sampling

    sampling.score_tokens(ctx.native, *args)
