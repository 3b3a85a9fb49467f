"""Linear layers of a model with 494 million parameters, against what the machine can read and multiply.

    python bench/kernels/bench_linear.py [--threads 2] [--dtype bfloat16|bf16_dot|float32|int8|int4]

Rows: 1 and 16 are decoding, 1024 is a prefill. Weights are cold: enough copies of a layer are
multiplied one after the other to fill more than any cache. "floor" is what the larger of two times
would be at the machine's measured limits: reading the weights once, and multiplying (with the best
instruction it has for the format, whatever --isa says). The share is the floor divided by the measured
median.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from engine import _native

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import machine, report, time_calls
from limits import Limits

# Name, in_features, out_features, layers of that shape.
SHAPES = (
    ("qkv", 896, 1152, 24),
    ("output", 896, 896, 24),
    ("gate_up", 896, 9728, 24),
    ("down", 4864, 896, 24),
    ("head", 896, 151936, 1),
)
ROWS = (1, 16, 1024)
COLD_BYTES = 400_000_000
LARGEST_ERROR = {"bfloat16": 1e-5, "bf16_dot": 0.005, "float32": 1e-5, "int8": 0.02, "int4": 0.2}


def packed(ctx, weight: torch.Tensor, dtype: str):
    matrix = _native.PackedMatrix(*weight.shape, dtype)
    matrix.pack_rows(ctx, 0, weight)
    return matrix


def check(ctx, weight: torch.Tensor, matrix, num_rows: int) -> None:
    """A few outputs against float64: a wrong result is not worth timing."""
    x = torch.randn(num_rows, weight.shape[1])
    out = torch.empty(num_rows, weight.shape[0])
    _native.linear(ctx, x, matrix, None, out)
    exact = x.double() @ weight[::97].double().T
    error = ((out[:, ::97] - exact).square().mean().sqrt() / exact.std()).item()
    assert error < LARGEST_ERROR[matrix.dtype], f"relative error {error}"


def measure(ctx, dtype: str, name: str, num_k: int, num_outputs: int, num_rows: int, repeats: int) -> dict:
    weight = torch.randn(num_outputs, num_k).bfloat16()
    first = packed(ctx, weight, dtype)
    check(ctx, weight, first, num_rows)
    num_copies = -(-COLD_BYTES // first.num_bytes) if num_rows < ROWS[-1] else 2
    copies = [first, *(packed(ctx, weight, dtype) for _ in range(num_copies - 1))]
    x, out = torch.randn(num_rows, num_k), torch.empty(num_rows, num_outputs)

    def run() -> None:
        for matrix in copies:
            _native.linear(ctx, x, matrix, None, out)

    timing = time_calls(run, calls=1, repeats=repeats)
    seconds = timing.median_us / num_copies * 1e-6
    return {
        "name": name,
        "rows": num_rows,
        "ms": seconds * 1e3,
        "spread": timing.spread,
        "gbps": first.num_bytes / seconds / 1e9,
        "gops": 2 * num_rows * num_k * num_outputs / seconds / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--dtype", default="bfloat16", choices=list(LARGEST_ERROR))
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.manual_seed(0)

    limits = Limits(args.threads)
    read = limits.read_gbps()
    unit = "int8" if args.dtype.startswith("int") else "fp32"
    multiply = limits.int8_gops() if unit == "int8" else limits.fp32_gflops()
    if args.dtype == "bf16_dot" and limits.bf16_gflops() > 0:
        unit, multiply = "bf16", limits.bf16_gflops()
    ctx = _native.ExecutionContext(args.threads, args.isa)
    print(f"{machine()}\n{args.threads} threads, {ctx.isa}, {args.dtype}")
    print(f"limits: read {read:.1f} GB/s, {unit} {multiply:.0f} Gop/s\n")
    print("layer     rows        ms  spread    GB/s    Gop/s  share of limit")
    rows, totals = [], dict.fromkeys(ROWS, (0.0, 0.0))
    for num_rows in ROWS:
        for name, num_k, num_outputs, num_layers in SHAPES:
            if name == "head" and num_rows == ROWS[-1]:
                continue  # only a prompt's last token needs it
            row = measure(ctx, args.dtype, name, num_k, num_outputs, num_rows, args.repeats)
            floor_ms = row["ms"] * max(row["gbps"] / read, row["gops"] / multiply)
            row["share"] = floor_ms / row["ms"]
            total_ms, total_floor_ms = totals[num_rows]
            totals[num_rows] = total_ms + num_layers * row["ms"], total_floor_ms + num_layers * floor_ms
            rows.append(row)
            print(
                f"{name:<8} {num_rows:5d} {row['ms']:9.3f}  {row['spread']:5.0%} {row['gbps']:8.1f} "
                f"{row['gops']:8.0f}  {row['share']:.0%}",
                flush=True,
            )
    steps = []
    for num_rows, (total_ms, floor_ms) in totals.items():
        print(f"all layers, {num_rows} rows: {total_ms:.1f} ms, {floor_ms / total_ms:.0%} of the limit")
        steps.append({"rows": num_rows, "ms": total_ms, "share": floor_ms / total_ms})
    report(
        "linear",
        {
            "threads": args.threads,
            "isa": ctx.isa,
            "dtype": args.dtype,
            "read_gbps": read,
            f"{unit}_gops": multiply,
            "layers": rows,
            "steps": steps,
        },
    )


if __name__ == "__main__":
    main()
