"""Paged attention, decoding and prefill, against what the machine can read and multiply.

    python bench/kernels/bench_paged_attention.py [--threads 2] [--isa auto] [--dtype bfloat16|float32|int8]

The cache is cold: each call finds its tokens in other blocks, which lie shuffled in more memory than
any cache holds, in huge pages as the server's cache. "floor" is the larger of two times at the machine's
measured limits: reading the keys and values once, those of a shared prefix once for all sequences, and
multiplying by the keys and values that each query sees. The share is the floor divided by the measured
median. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from engine import _native
from engine.ops import reference
from engine.ops.attention_plan import AttentionPlan
from engine.ops.paged_attention import paged_attention
from engine.runner.kv_cache import KVCache

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import machine, report, time_calls
from limits import Limits

BLOCK_SIZE = 16
COLD_BYTES = 400_000_000


@dataclasses.dataclass(frozen=True)
class Shape:
    model: str
    heads: int
    kv_heads: int
    head_dim: int


@dataclasses.dataclass(frozen=True)
class Step:
    """`batch` sequences with `rows` queries each, the last of `kv_len` tokens. The first `shared_len` lie in
    the same blocks; where `is_copied` is set, in equal blocks of their own."""

    name: str
    batch: int
    rows: int
    kv_len: int
    shared_len: int = 0
    is_copied: bool = False


SHAPES = (Shape("0.5b", 14, 2, 64), Shape("8b", 32, 8, 128))
STEPS = (
    Step("decode", 1, 1, 1024),
    Step("decode", 1, 1, 8192),
    Step("decode", 16, 1, 1024),
    Step("prefill", 1, 1024, 1024),
    Step("chunk", 1, 256, 8192),
    Step("prefix", 8, 1, 1072, shared_len=1024, is_copied=True),
    Step("shared", 8, 1, 1072, shared_len=1024),
)


class Work:
    """One shape's step, ready to run again and again on cold blocks."""

    def __init__(self, shape: Shape, step: Step, dtype: torch.dtype) -> None:
        self.scale = shape.head_dim**-0.5
        blocks_each = step.kv_len // BLOCK_SIZE
        head_bytes = shape.head_dim * dtype.itemsize + (4 if dtype == torch.int8 else 0)
        block_bytes = 2 * BLOCK_SIZE * shape.kv_heads * head_bytes
        shared = 0 if step.is_copied else step.shared_len // BLOCK_SIZE
        self.num_bytes = (step.batch * (blocks_each - shared) + shared) * block_bytes
        seen = step.rows * (2 * step.kv_len - step.rows + 1) // 2
        self.num_flops = 4 * step.batch * shape.heads * shape.head_dim * seen
        num_copies = -(-COLD_BYTES // self.num_bytes)
        num_blocks = num_copies * step.batch * blocks_each
        spec = SimpleNamespace(num_layers=1, num_kv_heads=shape.kv_heads, head_dim=shape.head_dim)
        cache = KVCache(spec, num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=dtype)
        [self.cache] = cache.layers
        for codes in (self.cache.keys, self.cache.values):
            codes.random_(-127, 128) if dtype == torch.int8 else codes.normal_()
        if self.cache.scales is not None:
            self.cache.scales.fill_(1 / 73)  # the deviation of the codes
        self.q = torch.randn(step.batch * step.rows, shape.heads, shape.head_dim)
        self.out = torch.empty_like(self.q)
        tables = torch.randperm(num_blocks).int().view(num_copies, step.batch, blocks_each)
        tables[:, :, :shared] = tables[:, :1, :shared]
        ends = torch.arange(0, len(self.q) + 1, step.rows, dtype=torch.int32)
        kv_lens = torch.full((step.batch,), step.kv_len, dtype=torch.int32)
        self.plans = itertools.cycle([AttentionPlan(ends, kv_lens, table) for table in tables])

    def run(self, ctx, plan: AttentionPlan | None = None) -> None:
        plan = plan or next(self.plans)
        keys, values, scales = self.cache
        paged_attention(ctx, self.q, keys, values, plan, self.scale, 0, 0.0, self.out, None, scales)

    def check(self, ctx) -> None:
        """The last sequence's last row against float64: a wrong result is not worth timing."""
        plan = next(self.plans)
        self.run(ctx, plan)
        ends = torch.tensor([0, 1], dtype=torch.int32)
        blocks = plan.block_tables[-1].long()
        last = AttentionPlan(ends, plan.kv_lens[-1:], torch.arange(len(blocks))[None])
        keys, values, scales = (None if tensor is None else tensor[blocks] for tensor in self.cache)
        exact = torch.empty(1, *self.q.shape[1:], dtype=torch.float64)
        reference.paged_attention(
            None, self.q[-1:], keys, values, last, self.scale, 0, 0.0, exact, None, scales
        )
        error = ((self.out[-1:] - exact).abs().max() / exact.std()).item()
        assert error < 1e-4, f"relative error {error}"


def measure(ctx, shape: Shape, step: Step, dtype: torch.dtype, limits: dict, repeats: int) -> dict:
    work = Work(shape, step, dtype)
    work.check(ctx)
    timing = time_calls(lambda: work.run(ctx), calls=1 if step.rows > 1 else 20, repeats=repeats)
    seconds = timing.median_us * 1e-6
    gbps, gflops = work.num_bytes / seconds / 1e9, work.num_flops / seconds / 1e9
    share = max(gbps / limits["read_gbps"], gflops / limits["fp32_gflops"])
    return {
        "model": shape.model,
        **dataclasses.asdict(step),
        "ms": seconds * 1e3,
        "spread": timing.spread,
        "gbps": gbps,
        "gflops": gflops,
        "share": share,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "int8"])
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.manual_seed(0)

    measured = Limits(args.threads)
    limits = {"read_gbps": measured.read_gbps(), "fp32_gflops": measured.fp32_gflops()}
    ctx = _native.ExecutionContext(args.threads, args.isa)
    print(f"{machine()}\n{args.threads} threads, {ctx.isa}, {args.dtype}")
    print(f"limits: read {limits['read_gbps']:.1f} GB/s, fp32 {limits['fp32_gflops']:.0f} GFLOP/s\n")
    print("model  step     batch  rows  context        ms  spread    GB/s  GFLOP/s  share of limit")
    results = []
    for shape, step in itertools.product(SHAPES, STEPS):
        row = measure(ctx, shape, step, getattr(torch, args.dtype), limits, args.repeats)
        results.append(row)
        print(
            f"{row['model']:<6} {row['name']:<8} {row['batch']:5d} {row['rows']:5d} {row['kv_len']:8d} "
            f"{row['ms']:9.3f}  {row['spread']:5.0%} {row['gbps']:8.1f} {row['gflops']:8.0f}  "
            f"{row['share']:.0%}",
            flush=True,
        )
    report(
        "paged_attention",
        {"threads": args.threads, "isa": ctx.isa, "dtype": args.dtype, **limits, "steps": results},
    )


if __name__ == "__main__":
    main()
