"""One row out of the rows of a text, on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from engine.ops.cuda.context import ExecutionContext


def pool(
    ctx: ExecutionContext | None,
    x: torch.Tensor,
    cu_rows: torch.Tensor,
    first_positions: torch.Tensor,
    mode: str,
    out: torch.Tensor,
) -> None:
    """As `engine.ops.pool`, by torch, which adds a text's rows one after the other: whoever shares the batch
    changes no bits. Launches only.

    Shapes: `x` [T, n] of any dtype, and the others as there, all on the device; no text is empty.
    """
    lengths, rows = cu_rows.diff().long(), x.float()
    if mode == "weighted_sum":
        before = (first_positions - cu_rows[:-1]).repeat_interleave(lengths, output_size=len(rows))
        rows = rows * (torch.arange(1, len(rows) + 1, device=x.device) + before)[:, None]
    joined = torch.segment_reduce(rows, "max" if mode == "max" else "sum", lengths=lengths, unsafe=True)
    if mode == "max":
        torch.maximum(out, joined, out=out)
    else:
        out.add_(joined)
