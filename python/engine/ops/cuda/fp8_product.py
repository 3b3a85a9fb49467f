"""Products with fp8 weights by torch: tensor cores multiply 8 bits by 8, so activations are rounded, too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from engine.ops.cuda.codes import LARGEST_E4M3

if TYPE_CHECKING:
    from engine.ops.cuda.context import ExecutionContext
    from engine.ops.cuda.matrix import PackedMatrix

LEAST_ROWS: int | None = None
"""The choice between the two products with fp8 weights: of so many rows and more torch's, of fewer Triton's,
which keeps activations as they are; None: always Triton's. `bench/gpu/bench_products.py` says from which
number on torch's is the faster one (docs/gpu.md)."""
MULTIPLE = 16
"""Of both sizes of a matrix that torch._scaled_mm takes."""
_LEAST_SCALE = 1e-12
"""Of a row of zeros."""


def is_chosen(ctx: ExecutionContext, x: torch.Tensor, weight: PackedMatrix, out: torch.Tensor) -> bool:
    """Whether `linear` is to run here. What bits must not depend on the batch never is."""
    is_faster = LEAST_ROWS is not None and len(x) >= LEAST_ROWS
    return is_faster and not ctx.is_deterministic and fits(x, weight, out)


def fits(x: torch.Tensor, weight: PackedMatrix, out: torch.Tensor) -> bool:
    """Whether torch takes these: scales of rows on both sides are for results in bfloat16 alone."""
    is_whole = not (weight.out_features % MULTIPLE or weight.in_features % MULTIPLE)
    return weight.dtype == "fp8" and is_whole and x.dtype == out.dtype == torch.bfloat16


def multiply(x: torch.Tensor, weight: PackedMatrix, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """out = round(x) weightᵀ + bias, where each row of x is rounded to e4m3 with a scale of its own.

    Shapes: x [T, K], out [T, N], both bfloat16; bias float32 [N].
    Cost: four bytes for each element of x while it is rounded, and one afterwards.
    """
    codes, scales = rounded(x)
    # Rows of weights are filled up to a multiple of 128 bytes.
    columns = weight.stored.view(torch.float8_e4m3fn)[:, : weight.in_features].T
    bias = None if bias is None else bias.to(out.dtype)
    options = {"bias": bias, "out_dtype": out.dtype, "use_fast_accum": True}
    if out.is_contiguous():
        torch._scaled_mm(codes, columns, scales, weight.scales[None], **options, out=out)
    else:
        out.copy_(torch._scaled_mm(codes, columns, scales, weight.scales[None], **options))


def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 codes [T, K], and what they are to be multiplied by, float32 [T, 1]."""
    wide = x.float()
    scales = (x.abs().amax(1, keepdim=True).float() / LARGEST_E4M3).clamp_min(_LEAST_SCALE)
    return wide.div_(scales).to(torch.float8_e4m3fn), scales
