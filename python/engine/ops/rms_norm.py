"""Root-mean-square normalisation."""

from __future__ import annotations

import torch

from engine import _native
from engine._native import ExecutionContext


def rms_norm(
    ctx: ExecutionContext, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor
) -> None:
    """out = x / sqrt(mean(x²) + eps) * weight, over the last dimension; `out` may be `x`.

    Shapes: `x`, `out` float32 [T, n] or [T, heads, n], rows contiguous; `weight` float32 [n].
    Source: Zhang and Sennrich 2019.
    """
    _native.rms_norm(ctx, x, weight, eps, out)


def add_rms_norm(
    ctx: ExecutionContext,
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
) -> None:
    """residual += x, then out = rms_norm(residual).

    Shapes: `x`, `residual`, `out` float32 [T, n]; `weight` float32 [n].
    Effects: updates `residual`.
    """
    _native.add_rms_norm(ctx, x, residual, weight, eps, out)
