"""Products of Llama-3.1-8B's layers: torch in bfloat16, fewer bits by Triton, and fp8 by torch.

    python bench/gpu/bench_products.py [--rows 1 16 64 256 4096]

Its limit is reading the weights once at the measured bandwidth of a copy, or the measured rate of a dense
product in bfloat16, whichever takes longer. "fp8" is Triton's product; "scaled_mm" is torch's, with a scale
for each row of both sides, which rounds activations to 8 bits, too: its time is with that rounding, its error
shows the cost. The last line is one JSON object; its "least_rows" is what LEAST_ROWS of
engine.ops.cuda.fp8_product is to be on such a card.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from device import copy_bandwidth, need_gpu, product_rate, relative_error, report, time_graph

from engine.ops.cuda import ExecutionContext, PackedMatrix, fp8_product, linear

SHAPES = {"qkv": (6144, 4096), "output": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
CODED = ("fp8", "int8", "int4")
MOST_ERROR = {"bfloat16": 5e-3, "fp8": 0.04, "int8": 0.02, "int4": 0.15, "scaled_mm": 0.06}

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
    matrix, out = packed(weight, "fp8"), x.new_empty(len(x), len(weight))
    assert fp8_product.fits(x, matrix, out)

    def call() -> torch.Tensor:
        fp8_product.multiply(x, matrix, None, out)
        return out

    return call


def least_rows(table: dict[str, dict[str, Any]], counts: Sequence[int]) -> int | None:
    """From how many rows on torch's product of fp8 takes less time than ours, over a layer's products; where
    it does not run, or is slower for the most rows, None."""
    found = None
    for count in sorted(counts, reverse=True):
        ours, theirs = (
            sum(table[f"{shape} x{count}"][name].get("us", float("inf")) for shape in SHAPES)
            for name in ("fp8", "scaled_mm")
        )
        if not theirs < ours:
            break
        found = count
    return found


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
    choice = least_rows(table, arguments.rows)
    print(f"fp8: torch's product is the faster one from {choice} rows on (None: never); set LEAST_ROWS so")
    report("gpu_products", {"products": table, "least_rows": choice})
    ours = [own for found in table.values() for name, own in found.items() if name != "scaled_mm"]
    sys.exit(any("refused" in own for own in ours))


if __name__ == "__main__":
    main()
