"""Root-mean-square normalisation on a GPU."""

from __future__ import annotations

import torch

from engine import _native
from engine.ops.cuda.context import ExecutionContext


def rms_norm(
    ctx: ExecutionContext, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor
) -> None:
    """out = x / sqrt(mean(x²) + eps) * weight, over the last dimension; `out` may be `x`.

    Computed in float32 and rounded once. A row's bits depend on nothing but the row.
    Shapes: `x`, `out` of the model's dtype, [T, n] or [T, heads, n], rows contiguous; `weight` float32 [n].
    """
    _native.cuda.rms_norm(x, weight, eps, out)


def add_rms_norm(
    ctx: ExecutionContext,
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
) -> None:
    """residual += x, rounded to its dtype, then out = rms_norm(residual), in one launch.

    Shapes: `x`, `residual`, `out` [T, n] of the model's dtype; `weight` float32 [n].
    """
    _native.cuda.add_rms_norm(x, residual, weight, eps, out)
