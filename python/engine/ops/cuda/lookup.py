"""Token embedding on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine import _native

if TYPE_CHECKING:
    import torch

    from engine.ops.cuda.context import ExecutionContext
    from engine.ops.cuda.matrix import PackedMatrix


def embedding(
    ctx: ExecutionContext, token_ids: torch.Tensor, weight: PackedMatrix, out: torch.Tensor
) -> None:
    """out[t] = weight[token_ids[t]]; zeros for an id outside [0, V).

    Ids may come straight from the sampler, which draws -1 where every token is ruled out: torch's own lookup
    would end the process for that.
    Shapes: `token_ids` int32 [T]; `weight` [V, K] of the model's dtype, or of codes; `out` [T, K] of that
    dtype, any row stride.
    """
    if weight.is_coded:
        from engine.ops.cuda.triton_product import look_up  # Triton only where it is needed

        look_up(token_ids, weight, out)
        if (rows := weight.unfit(out)) is not out:
            out.copy_(rows)
        return
    _native.cuda.embedding(token_ids, weight.weight, out)
