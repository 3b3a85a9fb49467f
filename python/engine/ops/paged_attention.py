"""Causal attention over the paged cache, for any mix of prefill and decode rows."""

from __future__ import annotations

import torch

from engine import _native
from engine._native import ExecutionContext
from engine.ops.attention_plan import AttentionPlan


def paged_attention(
    ctx: ExecutionContext,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: AttentionPlan,
    scale: float,
    window: int,
    softcap: float,
    out: torch.Tensor,
) -> None:
    """out = softmax(cap(q kᵀ scale)) v for each query over the keys it may see.

    A query sees itself and earlier positions, with `window` > 0 only the last `window` of them.
    With `softcap` > 0, cap(x) = softcap tanh(x / softcap).
    Shapes: `q`, `out` float32 [T, H, D]; `k_cache` [N, G, D, S] and `v_cache` [N, G, S, D].
    """
    _native.paged_attention(
        ctx,
        q,
        k_cache,
        v_cache,
        plan.cu_seqlens_q,
        plan.kv_lens,
        plan.block_tables,
        scale,
        window,
        softcap,
        out,
    )
