"""Mixtures of experts on a GPU, without asking it who chose whom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from engine.errors import NativeError

if TYPE_CHECKING:
    from engine.ops.cuda.context import ExecutionContext
    from engine.ops.cuda.matrix import PackedMatrix

Gate = Callable[[torch.Tensor, torch.Tensor], None]


class ExpertMatrices:
    """One matrix [N, K] of each expert, where it lies. They must be packed, and alike.

    Shapes: `table` int64 [E, 5], the addresses of codes or floats, scales, offsets, bias (float32 [N]) and
    column scales, 0 for what there is not.
    """

    def __init__(self, matrices: Sequence[PackedMatrix], biases: Sequence[torch.Tensor | None]) -> None:
        self.first = matrices[0]
        self._parts = []
        self.has_bias = biases[0] is not None
        self.has_column_scales = any(matrix.column_scales for matrix in matrices)
        if not all(matrix.is_complete for matrix in matrices):
            raise NativeError("weight: not all of its rows have been packed")
        for matrix, bias in zip(matrices, biases, strict=True):
            scales = matrix.balanced_columns if self.has_column_scales else None
            self._parts.append((matrix.stored, matrix.scales, matrix.offsets, bias, scales))  # kept alive
        addresses = [[0 if part is None else part.data_ptr() for part in parts] for parts in self._parts]
        self.table = torch.tensor(addresses, device=self.first.stored.device)


def are_alike(matrices: Sequence[PackedMatrix]) -> bool:
    """Whether one kernel reads them all. Columns in an order of their own would have to be gathered."""
    kinds = {(matrix.dtype, matrix.group_len) for matrix in matrices}
    return len(kinds) == 1 and not any(matrix.column_order for matrix in matrices)


def experts(
    ctx: ExecutionContext,
    x: torch.Tensor,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    gate_up: ExpertMatrices,
    gate: Gate,
    down: ExpertMatrices,
    out: torch.Tensor,
) -> None:
    """out[t] = sum of weights[t, r] * down(gate(gate_up(x[t]))) of expert expert_ids[t, r].

    `gate` makes [P, I] of [P, 2 I], gate first. Rows between the products are rounded to their dtype; those
    of a token's experts are added in float32, in order of r. Every size follows from the number of rows, so
    that a graph can be captured. With `ctx.is_deterministic` a row's bits do not depend on the others.

    Shapes: x, out [T, E] of the model's dtype; weights float32 and expert_ids int64 [T, R].
    Cost: an expert that was chosen is read once for up to 128 of its rows; memory for T * R rows of 3 I + E.
    """
    from engine.ops.cuda import triton_experts  # Triton only where it is needed

    num_rows, num_chosen = expert_ids.shape
    if num_rows == 0:
        return
    sorted_ids, order = expert_ids.flatten().sort(stable=True)
    numbers = torch.arange(len(gate_up.table) + 1, device=x.device)
    work = order, torch.searchsorted(sorted_ids, numbers), num_chosen
    inner = x.new_empty(len(order), gate_up.first.out_features)
    triton_experts.multiply(ctx, x, gate_up, *work, inner, gathers=True)
    product = x.new_empty(len(order), down.first.in_features)
    gate(inner, product)
    results = x.new_empty(len(order), down.first.out_features)
    triton_experts.multiply(ctx, product, down, *work, results, gathers=False)
    triton_experts.add_up(results, weights, out)
