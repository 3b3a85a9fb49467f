"""A smooth bound on logits."""

from __future__ import annotations

import torch

from engine import _native
from engine._native import ExecutionContext


def softcap(ctx: ExecutionContext, x: torch.Tensor, cap: float) -> None:
    """x = cap * tanh(x / cap), in place.

    Shapes: `x` float32 [T, n]. Source: Gemma Team 2024 (Gemma 2), section 2.
    """
    _native.softcap(ctx, x, cap)
