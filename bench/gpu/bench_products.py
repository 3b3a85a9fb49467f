"""Products of Llama-3.1-8B's layers: torch in bfloat16, fewer bits by Triton, and fp8 by torch.

    python bench/gpu/bench_products.py [--rows 1 16 64 256 4096]

Its limit is reading the weights once at the measured bandwidth of a copy, or the measured rate of a dense
product in bfloat16, whichever takes longer. "scaled_mm" is torch._scaled_mm with a scale for each row of both
sides, which rounds activations to 8 bits, too: its time is with that rounding, its error shows the cost.
The last line is one JSON object, the table from which fp8's product is to be chosen.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from device import copy_bandwidth, need_gpu, product_rate, relative_error, report, time_graph

from engine.ops.cuda import ExecutionContext, PackedMatrix, linear

SHAPES = {"qkv": (6144, 4096), "output": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
CODED = ("fp8", "int8", "int4")
MOST_ERROR = {"bfloat16": 5e-3, "fp8": 0.04, "int8": 0.02, "int4": 0.15, "scaled_mm": 0.06}
LARGEST_E4M3 = 448.0
MULTIPLE = 16
"""Of both sizes of a matrix that torch._scaled_mm takes."""

Call = Callable[[], torch.Tensor]


def packed(weight: torch.Tensor, dtype: str) -> PackedMatrix:
    with torch.device(weight.device):
        matrix = PackedMatrix(*weight.shape, dtype)
    matrix.pack_rows(None, 0, weight)
    return matrix


def by_ours(ctx: ExecutionContext, x: torch.Tensor, weight: torch.Tensor, dtype: str) -> Call:
    matrix, out = packed(weight, dtype), x.new_empty(len(x), len(weight))

    def call() -> torch.Tensor:
        linear(ctx, x, matrix, None, out)
        return out

    return call


def by_scaled_mm(x: torch.Tensor, weight: torch.Tensor) -> Call:
    """The second factor must lie column by column, as the transposed weights do; results are bfloat16."""
    assert not any(size % MULTIPLE for size in weight.shape)
    codes, scales = rounded(weight)
    other, other_scales = codes.T, scales.T.contiguous()

    def call() -> torch.Tensor:
        rows, row_scales = rounded(x)
        return torch._scaled_mm(rows, other, row_scales, other_scales, out_dtype=torch.bfloat16)

    return call


def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 codes [n, K], and what they are to be multiplied by, float32 [n, 1]."""
    scales = x.abs().amax(1, keepdim=True).float().clamp_min(1e-12) / LARGEST_E4M3
    return (x.float() / scales).clamp(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn), scales


def measure(name: str, call: Call, expected: torch.Tensor) -> dict[str, Any]:
    """Microseconds and relative error, or why there are none: torch._scaled_mm does not take every GPU."""
    try:
        error = relative_error(call(), expected)
        if not error <= MOST_ERROR[name]:
            return {"refused": f"its error is {error:.3g}"}
        return {"us": time_graph([call]).median_us, "error": error}
    except RuntimeError as refusal:
        return {"refused": " ".join(str(refusal).split())[:200]}


def shown(found: dict[str, dict[str, Any]]) -> str:
    return "  ".join(
        f"{key} {own['us']:.1f}" if "us" in own else f"{key}: {own}" for key, own in found.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256, 4096])
    arguments = parser.parse_args()
    need_gpu()
    ctx = ExecutionContext()
    bandwidth, rate = copy_bandwidth(), product_rate()
    table: dict[str, dict[str, Any]] = {}
    for shape, (num_columns, num_k) in SHAPES.items():
        weight = torch.randn(num_columns, num_k, device="cuda", dtype=torch.bfloat16) / num_k**0.5
        for num_rows in arguments.rows:
            x = torch.randn(num_rows, num_k, device="cuda", dtype=torch.bfloat16)
            expected = x.float() @ weight.float().T
            found = {
                dtype: measure(dtype, by_ours(ctx, x, weight, dtype), expected)
                for dtype in ("bfloat16", *CODED)
            }
            found["scaled_mm"] = measure("scaled_mm", by_scaled_mm(x, weight), expected)
            read_s, multiply_s = 2 * weight.numel() / bandwidth, 2 * num_rows * weight.numel() / rate
            found["limit_of_bfloat16"] = {"us": 1e6 * max(read_s, multiply_s)}
            table[f"{shape} x{num_rows}"] = found
            print(f"{shape:8} {num_rows:5} rows, us:  {shown(found)}", flush=True)
    report("gpu_products", {"products": table})
    ours = [own for found in table.values() for name, own in found.items() if name != "scaled_mm"]
    sys.exit(any("refused" in own for own in ours))


if __name__ == "__main__":
    main()
