"""Token embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine import _native

if TYPE_CHECKING:
    import torch

    from engine._native import ExecutionContext, PackedMatrix


def embedding(
    ctx: ExecutionContext, token_ids: torch.Tensor, weight: PackedMatrix, out: torch.Tensor
) -> None:
    """out[t] = weight[token_ids[t]], read from the packed head, so that a tied embedding is stored once.

    Shapes: token_ids int32 [T]; weight [V, K], all rows packed; out float32 [T, K], any row stride.
    Raises: NativeError for an id outside [0, V); nothing is written then.
    Cost: a token's weights are spread over one panel, so each reads a cache line for every k.
    """
    _native.embedding(ctx, token_ids, weight, out)
