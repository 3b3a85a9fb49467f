"""Ops that do the work of two in one pass, against the two, in turns.

    python bench/kernels/bench_fused.py [--threads 1] [--dtype bfloat16] [--rounds 15]

Of layers with qwen05's shape. Few rows find cold weights: enough copies to fill more than any cache. CPU time
of the process, so that a busy machine harms it less; of the ratio, median and quartiles of the rounds. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from time import process_time_ns

import torch

from engine import _native
from engine.ops import native as ops

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import machine, report

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 896, 4864, 14, 2, 64
BLOCK_SIZE = 16
ROWS = (1, 16, 256, 1024)
COLD_BYTES = 400_000_000
Run = Callable[[], None]


def gate_and_up(ctx: _native.ExecutionContext, dtype: str, num_rows: int) -> tuple[Run, Run]:
    """Joined in the product's op, and by an op of its own."""
    weight = torch.randn(2 * INNER, HIDDEN).bfloat16()
    copies = []
    while not copies or (num_rows <= 16 and sum(copy.num_bytes for copy in copies) < COLD_BYTES):
        copies.append(ops.PackedMatrix(2 * INNER, HIDDEN, dtype))
        copies[-1].pack_rows(ctx, 0, weight)
    x, gate_up = torch.randn(num_rows, HIDDEN), torch.empty(num_rows, 2 * INNER)
    together, apart = torch.empty(num_rows, INNER), torch.empty(num_rows, INNER)

    def run_together() -> None:
        for matrix in copies:
            ops.gated_linear(ctx, x, matrix, None, "silu", together)

    def run_apart() -> None:
        for matrix in copies:
            ops.linear(ctx, x, matrix, None, gate_up)
            ops.silu_mul(ctx, gate_up, apart)

    run_together()
    run_apart()
    assert torch.equal(together, apart)
    return run_together, run_apart


def rope_and_append(ctx: _native.ExecutionContext, _dtype: str, num_rows: int) -> tuple[Run, Run]:
    """In one op, and in two; of 24 layers."""
    num_blocks = -(-num_rows // BLOCK_SIZE)
    k_cache = torch.zeros(24, 2, num_blocks, KV_HEADS, HEAD_DIM, BLOCK_SIZE, dtype=torch.bfloat16)
    v_cache = torch.zeros(24, 2, num_blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM, dtype=torch.bfloat16)
    angles = torch.randn(num_rows, HEAD_DIM // 2)
    turn = angles.cos(), angles.sin(), torch.arange(num_rows, dtype=torch.int32)
    slot_ids = torch.arange(num_rows)
    start = torch.randn(num_rows, HEADS + 2 * KV_HEADS, HEAD_DIM)
    qkv = torch.stack([start, start])
    (q, k, v), (q2, k2, v2) = (one.split([HEADS, KV_HEADS, KV_HEADS], 1) for one in qkv)

    def run_together() -> None:
        for layer in range(24):
            caches = k_cache[layer, 0], v_cache[layer, 0]
            ops.rope_append_kv(ctx, q, k, v, *turn, *caches, slot_ids)

    def run_apart() -> None:
        for layer in range(24):
            caches = k_cache[layer, 1], v_cache[layer, 1]
            ops.rope(ctx, q2, k2, *turn)
            ops.append_kv(ctx, k2, v2, *caches, slot_ids)

    run_together()
    run_apart()
    assert torch.equal(k_cache[:, 0], k_cache[:, 1]) and torch.equal(qkv[0], qkv[1])
    return run_together, run_apart


def cpu_ms(run: Run, calls: int) -> float:
    begin = process_time_ns()
    for _ in range(calls):
        run()
    return (process_time_ns() - begin) * 1e-6 / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "int8", "int4"])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.manual_seed(0)
    ctx = ops.ExecutionContext(args.threads, "auto")
    print(f"{machine()}\n{args.threads} threads, {ctx.isa}, {args.dtype}\n")
    print("op                    rows   together ms   apart ms   together / apart")
    results = []
    for name, prepare in (("gated_linear", gate_and_up), ("rope_append_kv", rope_and_append)):
        for num_rows in ROWS:
            runs = prepare(ctx, args.dtype, num_rows)
            calls = max(1, round(20 / cpu_ms(runs[0], 1)))
            samples = [[cpu_ms(run, calls) for run in runs] for _ in range(args.rounds)]
            together, apart = (statistics.median(side) for side in zip(*samples, strict=True))
            ratios = [a / b for a, b in samples]
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(
                f"{name:<20} {num_rows:5d} {together:13.3f} {apart:10.3f} {middle:11.3f} "
                f"({low:.3f} to {high:.3f})",
                flush=True,
            )
            results.append({"op": name, "rows": num_rows, "together_ms": together, "apart_ms": apart})
            results[-1]["ratio"] = middle
    report("fused", {"threads": args.threads, "isa": ctx.isa, "dtype": args.dtype, "ops": results})


if __name__ == "__main__":
    main()
