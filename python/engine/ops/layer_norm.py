"""Layer normalisation."""

from __future__ import annotations

import torch

from engine import _native
from engine._native import ExecutionContext


def layer_norm(
    ctx: ExecutionContext,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    out: torch.Tensor,
) -> None:
    """residual += x, if there is one; out = (it - its mean) / sqrt(its variance + eps) * weight + bias.

    Shapes: `x`, `residual`, `out` float32 [T, n], rows contiguous; `weight`, `bias` float32 [n].
    `out` may be `x` or `residual`.
    Effects: updates `residual`.
    Source: Ba, Kiros and Hinton 2016.
    """
    _native.layer_norm(ctx, x, residual, weight, bias, eps, out)
