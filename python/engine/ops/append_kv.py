"""Write a step's keys and values into the paged cache."""

from __future__ import annotations

import torch

from engine import _native
from engine._native import ExecutionContext


def append_kv(
    ctx: ExecutionContext,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_ids: torch.Tensor,
    kv_scales: torch.Tensor | None = None,
) -> None:
    """Store token t in slot `slot_ids[t]`, rounded to the cache's dtype (to nearest, ties to even).

    Keys lie with the tokens of a block side by side, so that `paged_attention` computes the scores of
    sixteen tokens in the lanes of one vector. Slots are distinct.
    A cache of int8 holds codes: each token and KV head gets the scale that its largest number needs, in
    `kv_scales`; NaN where a number is not finite. It follows from that token and head alone.
    Shapes: `k`, `v` float32 [T, G, D]; `k_cache` [N, G, D, S] and `v_cache` [N, G, S, D], bfloat16
    or float32, or int8 with `kv_scales` float32 [N, G, 2, S], those of keys and those of values; `slot_ids`
    int64 [T].
    Effects: writes the caches.
    Raises: NativeError for a slot outside the cache, before anything is written.
    """
    _native.append_kv(ctx, k, v, k_cache, v_cache, slot_ids, kv_scales)
