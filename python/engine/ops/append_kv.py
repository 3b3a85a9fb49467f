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
) -> None:
    """Store token t in slot `slot_ids[t]`, rounded to the cache's dtype.

    Shapes: `k`, `v` float32 [T, G, D]; `k_cache` [N, G, D, S] and `v_cache` [N, G, S, D], bfloat16
    or float32; `slot_ids` int64 [T].
    Effects: writes the caches.
    """
    _native.append_kv(ctx, k, v, k_cache, v_cache, slot_ids)
