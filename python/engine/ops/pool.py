"""One row out of the rows of a text."""

from __future__ import annotations

import torch

from engine import _native
from engine._native import ExecutionContext


def pool(
    ctx: ExecutionContext,
    x: torch.Tensor,
    cu_rows: torch.Tensor,
    first_positions: torch.Tensor,
    mode: str,
    out: torch.Tensor,
) -> None:
    """Take the rows of each text up into its row of `out`, one by one and in order.

    "sum" adds them, "weighted_sum" times their position counted from 1, "max" keeps the largest of each
    column. What `out` held before counts, so a text may come in pieces; the bits are the same.
    Shapes: `x` float32 [T, n]; `cu_rows` int32 [B + 1], prefix sums of the texts' rows; `first_positions`
    int32 [B], of each text's first row here; `out` float32 [B, n].
    """
    _native.pool(ctx, x, cu_rows, first_positions, mode, out)
