"""What adapters add to linear layers and to the embedding, each row with its own adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine import _native
from engine._native import LoraAdapter, LoraPlan

if TYPE_CHECKING:
    import torch

    from engine._native import ExecutionContext

__all__ = ["LoraAdapter", "LoraPlan", "lora", "lora_embedding"]


def lora(
    ctx: ExecutionContext,
    x: torch.Tensor,
    site: int,
    plan: LoraPlan,
    workspace: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """out[t] += scale (x[t] Aᵀ) Bᵀ for the rows of the plan, with what the row's adapter has at `site`.

    The bits of a row depend on nothing but the row, its adapter and what `out` held before.

    Shapes: x float32 [T, K], out float32 [T, N], both with any row stride; workspace float32 [W], W at
    least the sum of rows times ranks (of all modules of the site) over the plan's adapters. A site that an
    adapter does not have costs nothing.
    Source: Hu et al. 2021; docs/decisions/0009-low-rank-adapters.md for the order of sums.
    """
    _native.lora(ctx, x, site, plan, workspace, out)


def lora_embedding(
    ctx: ExecutionContext,
    token_ids: torch.Tensor,
    site: int,
    plan: LoraPlan,
    workspace: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """The same at an embedding: instead of x[t] Aᵀ, column token_ids[t] of A.

    Shapes: token_ids int32 [T]; the others as for `lora`.
    Raises: NativeError for an id that the embedding does not have.
    """
    _native.lora_embedding(ctx, token_ids, site, plan, workspace, out)
