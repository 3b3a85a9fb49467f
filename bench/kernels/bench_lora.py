"""What adapters cost in a decode step of the 0.5-billion-parameter shape, beside the base's products.

    python bench/kernels/bench_lora.py [--threads 4] [--repeats 30]

Adapters of rank 16 in bf16 at every linear layer, one row each. A step's base products and the
adapters' run in turns, each on all layers, so that every weight comes from memory. The extra time is
compared with the adapters' bytes over the read bandwidth that the base products reach here. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from time import perf_counter_ns

import torch

from engine.ops import native, reference

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import machine, report

HIDDEN, KV, INNER, LAYERS, VOCAB, RANK = 896, 128, 4864, 24, 151936, 16
LINEARS = {
    "qkv": (HIDDEN, (HIDDEN, KV, KV)),
    "o": (HIDDEN, (HIDDEN,)),
    "gate_up": (HIDDEN, (INNER, INNER)),
    "down": (INNER, (HIDDEN,)),
}
WORKLOADS = {
    "8 adapters, all linear modules": (8, 8, None),
    "8 adapters, q and v": (8, 8, {("qkv", 0), ("qkv", 2)}),
    "1 adapter, batch 1": (1, 1, None),
}
"""(rows, adapters, targeted parts of fused layers or None for all)."""


def sites(targets: set[tuple[str, int]] | None, ops=native) -> list:
    made = []
    for _ in range(LAYERS):
        for name, (in_features, parts) in LINEARS.items():
            starts = [sum(parts[:i]) for i in range(len(parts))]
            modules = [
                (start, count, RANK, 2.0)
                for i, (start, count) in enumerate(zip(starts, parts, strict=True))
                if targets is None or (name, i) in targets
            ]
            made.append((in_features, False, modules))
    return made


def make_adapter(ops, layer_sites: list, seed: int):
    generator = torch.Generator().manual_seed(seed)
    adapter = ops.LoraAdapter("bfloat16", layer_sites)
    for number, (in_features, _, modules) in enumerate(layer_sites):
        for index, (_, columns, rank, _) in enumerate(modules):
            a = torch.randn(rank, in_features, generator=generator) * 0.02
            adapter.pack(number, index, a, torch.randn(columns, rank, generator=generator) * 0.02)
    return adapter


def make_plan(ops, adapters: list, num_rows: int):
    rows = torch.arange(num_rows, dtype=torch.int32)
    share = num_rows // len(adapters)
    return ops.LoraPlan(adapters, torch.arange(0, num_rows + 1, share, dtype=torch.int32), rows)


class Step:
    """The linear layers of one decode step, with and without adapters."""

    def __init__(self, ctx, num_rows: int) -> None:
        self.ctx = ctx
        self.weights = []
        for _ in range(LAYERS):
            for in_features, parts in LINEARS.values():
                self.weights.append(self._packed(sum(parts), in_features))
        self.head = self._packed(VOCAB, HIDDEN)
        self.bytes = sum(w.num_bytes for w in self.weights) + self.head.num_bytes
        self.x = {k: torch.randn(num_rows, k) for k in (HIDDEN, INNER)}
        self.outs = [torch.zeros(num_rows, w.out_features) for w in self.weights[:4]]
        self.logits = torch.zeros(num_rows, VOCAB)
        self.workspace = torch.empty(1 << 16)

    def _packed(self, out_features: int, in_features: int):
        weight = native.PackedMatrix(out_features, in_features, "bfloat16")
        weight.pack_rows(self.ctx, 0, torch.zeros(out_features, in_features, dtype=torch.bfloat16))
        return weight

    def run(self, plan=None) -> None:
        for site, weight in enumerate(self.weights):
            x, out = self.x[weight.in_features], self.outs[site % 4]
            native.linear(self.ctx, x, weight, None, out)
            if plan is not None:
                native.lora(self.ctx, x, site, plan, self.workspace, out)
        native.linear(self.ctx, self.x[HIDDEN], self.head, None, self.logits)


def check(ctx) -> None:
    """One fused layer against the reference."""
    layer_sites = sites(None)[:4]
    x = torch.randn(2, HIDDEN)
    results = []
    for ops in (native, reference):
        plan = make_plan(ops, [make_adapter(ops, layer_sites, i) for i in range(2)], 2)
        out = torch.zeros(2, HIDDEN + 2 * KV)
        ops.lora(ctx, x, 0, plan, torch.empty(1000), out)
        results.append(out)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    ctx = native.ExecutionContext(args.threads)
    check(ctx)
    print(f"{machine()}\n")
    results = []
    for name, (num_rows, num_adapters, targets) in WORKLOADS.items():
        step = Step(ctx, num_rows)
        adapters = [make_adapter(native, sites(targets), seed) for seed in range(num_adapters)]
        plan = make_plan(native, adapters, num_rows)
        base_ms, with_ms = [], []
        for repeat in range(args.repeats + 3):
            for samples, own in ((base_ms, None), (with_ms, plan)):
                begin = perf_counter_ns()
                step.run(own)
                if repeat >= 3:
                    samples.append((perf_counter_ns() - begin) / 1e6)
        base, extra = (
            statistics.median(base_ms),
            statistics.median(b - a for a, b in zip(base_ms, with_ms, strict=True)),
        )
        adapter_bytes = sum(a.num_bytes for a in adapters)
        gb_s = step.bytes / statistics.median(base_ms) / 1e6
        ideal = adapter_bytes / gb_s / 1e6
        print(
            f"{name:32s} base {base:7.2f} ms ({gb_s:5.1f} GB/s)  extra {extra:6.2f} ms = {extra / base:5.1%}"
            f"  {extra / ideal:4.2f} x the time to read {adapter_bytes / 1e6:.0f} MB",
            flush=True,
        )
        results.append(
            {"name": name, "base_ms": base, "extra_ms": extra, "bytes": adapter_bytes, "gb_s": gb_s}
        )
    report("lora", {"workloads": results})


if __name__ == "__main__":
    main()
