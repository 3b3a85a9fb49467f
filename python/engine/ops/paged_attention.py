"""Attention over the paged cache, for any mix of prefill and decode rows, and for encoders."""

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
    sinks: torch.Tensor | None = None,
    kv_scales: torch.Tensor | None = None,
) -> None:
    """out = softmax(cap(q kᵀ scale)) v for each query over the keys it may see.

    A query sees itself and earlier positions, with `window` > 0 only the last `window` of them; where the
    plan is not causal, as many later ones, too.
    With `softcap` > 0, cap(x) = softcap tanh(x / softcap).
    `sinks` are scores, one a head, that take part in the softmax and bring no value.
    A row's result is the same to the last bit whatever the other rows, the chunk that it comes in, the
    blocks that hold its tokens, their size, and the number of threads.
    Shapes: `q`, `out` float32 [T, H, D]; `k_cache` [N, G, D, S] and `v_cache` [N, G, S, D], bfloat16 or
    float32, or int8 with `kv_scales` float32 [N, G, 2, S] as `append_kv` writes them; `sinks` float32 [H];
    H a multiple of G; D and S multiples of 16 up to 256.
    Raises: NativeError where the plan does not fit the tensors, before anything is written. Only the
    part of a block table is read and checked that holds tokens which a row sees.
    Cost: each key and value is read once for 32 pairs of row and head of a group, and for sequences with few
    rows that share its block.
    Source: Dao et al. 2022 (online softmax over tiles); Kwon et al. 2023 (block tables); Xiao et al. 2023
    (sinks).
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
        plan.is_causal,
        out,
        sinks,
        kv_scales,
    )
