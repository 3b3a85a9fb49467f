"""Rotary position embedding."""

from __future__ import annotations

import torch

from engine import _native
from engine._native import ExecutionContext


def rope(
    ctx: ExecutionContext,
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Rotate the first R elements of each head; element i pairs with i + R / 2, the rest stays.

    Products and sums are rounded one by one, which gives the bits that transformers gives in float32.
    Shapes: `q` float32 [T, H, D]; `k` float32 [T, G, D]; `cos`, `sin` float32 [P, R / 2];
    `positions` int32 [T], each below P.
    Effects: in place.
    Raises: NativeError for a position outside the tables, before anything is written.
    Source: Su et al. 2021.
    """
    _native.rope(ctx, q, k, cos, sin, positions)


def rope_append_kv(
    ctx: ExecutionContext,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_ids: torch.Tensor,
    kv_scales: torch.Tensor | None = None,
) -> None:
    """`rope`, and then `append_kv` of the rotated keys, in one call and while they are cached.

    Raises: NativeError as both, before anything is written.
    """
    _native.rope_append_kv(ctx, q, k, v, cos, sin, positions, k_cache, v_cache, slot_ids, kv_scales)
