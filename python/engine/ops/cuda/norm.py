"""Normalisation on a GPU."""

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


def layer_norm(
    ctx: ExecutionContext,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    out: torch.Tensor,
) -> None:
    """residual += x, rounded to its dtype, if there is one; then out = (it - its mean) / sqrt(its variance +
    eps) * weight + bias, by torch.

    Computed in float32 and rounded once. `out` may be `x` or `residual`.
    Shapes: `x`, `residual`, `out` [T, n] of the model's dtype; `weight`, `bias` float32 [n].
    """
    if residual is not None:
        x = residual.add_(x)
    out.copy_(torch.nn.functional.layer_norm(x.float(), weight.shape, weight, bias, eps))
