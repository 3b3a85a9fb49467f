"""Linear layers on packed weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine import _native
from engine._native import PackedMatrix

if TYPE_CHECKING:
    import torch

    from engine._native import ExecutionContext

__all__ = ["PackedMatrix", "linear"]


def linear(
    ctx: ExecutionContext, x: torch.Tensor, weight: PackedMatrix, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """out = x weightᵀ + bias, each row by itself: its bits do not depend on the batch or on threads.

    Shapes: x float32 [T, K], out float32 [T, N], both with any row stride; weight [N, K], all rows
    packed; bias float32 [N]. `out` must not overlap `x`.
    Cost: up to about 16 rows one read of the weights, at the speed of memory; from there on 2 T K N
    operations of fp32 FMA, for bf16 weights too.
    Source: docs/decisions/0001-order-of-sums.md for the order in which products are added; 0020 for
    "bf16_dot", which rounds x to bfloat16.
    """
    _native.linear(ctx, x, weight, bias, out)
