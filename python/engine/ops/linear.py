"""Products with packed weights."""

from __future__ import annotations

import torch

from engine import _native
from engine._native import ExecutionContext, PackedLinear

__all__ = ["PackedLinear", "embedding", "linear"]


def linear(
    ctx: ExecutionContext, x: torch.Tensor, w: PackedLinear, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """out = x wᵀ + bias; a row's result does not depend on the other rows.

    Shapes: `x` float32 [T, K]; `w` N rows of K; `bias` float32 [N]; `out` float32 [T, N].
    """
    _native.linear(ctx, x, w, bias, out)


def embedding(ctx: ExecutionContext, token_ids: torch.Tensor, w: PackedLinear, out: torch.Tensor) -> None:
    """Rows of a packed matrix, so that a tied embedding is stored once.

    Shapes: `token_ids` int32 [T]; `w` V rows of K; `out` float32 [T, K].
    """
    _native.embedding(ctx, token_ids, w, out)
