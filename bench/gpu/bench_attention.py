"""Decode and prefill attention beside torch's scaled_dot_product_attention and, if installed, flashinfer.

    python bench/gpu/bench_attention.py

32 query heads on 8 KV heads of 128, bfloat16. Decode: 64 sequences of 4,096 tokens; its limit is reading keys
and values once at the measured bandwidth of a copy. Prefill: 8,192 tokens, causal; its limit is the visible
half of the products at the measured rate of a dense one. Block tables are shuffled. Results are checked
against torch first. The last line is one JSON object.
"""

from __future__ import annotations

import numpy as np
import torch
from device import Timing, check, copy_bandwidth, need_gpu, product_rate, report, time_graph
from rivals import by_flashinfer, decode_attention, prefill_attention
from torch.nn.functional import scaled_dot_product_attention

from engine.ops import cuda
from engine.ops.cuda.plan import DevicePlan, split_rows

HEADS, KV_HEADS, DIM, BLOCK = 32, 8, 128, 16
SCALE = DIM**-0.5
COLD_SETS = 2  # of a gigabyte each at the decode shape: no cache holds what the other left


def make_plan(num_queries: list[int], kv_lens: list[int], seed: int = 0) -> DevicePlan:
    cu_seqlens_q = np.cumsum([0, *num_queries]).astype(np.int32)
    decode_rows, tiles = split_rows(cu_seqlens_q)
    counts = [-(-length // BLOCK) for length in kv_lens]
    blocks = np.random.default_rng(seed).permutation(sum(counts)).astype(np.int32)
    tables = np.zeros((len(kv_lens), max(counts)), np.int32)
    for row, (count, end) in enumerate(zip(counts, np.cumsum(counts), strict=True)):
        tables[row, :count] = blocks[end - count : end]
    arrays = cu_seqlens_q, np.array(kv_lens, np.int32), tables, decode_rows, tiles
    cu, lens, tables, decode_rows, tiles = (torch.from_numpy(array).cuda() for array in arrays)
    most = max(kv_lens)
    return DevicePlan(
        cu, lens, tables, decode_rows=decode_rows, tiles=tiles, max_decode_kv_len=most, max_kv_len=most
    )


class Case:
    """Queries and a paged cache of random numbers, and the same keys and values in one piece."""

    def __init__(self, num_queries: list[int], kv_lens: list[int]) -> None:
        self.plan = make_plan(num_queries, kv_lens)
        num_blocks = sum(-(-length // BLOCK) for length in kv_lens)
        shape = num_blocks, KV_HEADS, BLOCK, DIM
        self.keys, self.values = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        self.q = torch.randn(sum(num_queries), HEADS, DIM, device="cuda", dtype=torch.bfloat16)
        self.out = torch.full_like(self.q, float("nan"))

    def attend(self, ctx: cuda.ExecutionContext) -> None:
        cuda.paged_attention(ctx, self.q, self.keys, self.values, self.plan, SCALE, 0, 0.0, self.out)

    def whole(self, row: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [G, length, D] of a sequence."""
        blocks = self.plan.block_tables[row, : -(-length // BLOCK)].long()
        return tuple(x[blocks].transpose(0, 1).flatten(1, 2)[:, :length] for x in (self.keys, self.values))


def decode(ctx: cuda.ExecutionContext, batch: int = 64, length: int = 4096) -> dict[str, float | str]:
    cases = [Case([1] * batch, [length] * batch) for _ in range(COLD_SETS)]
    cases[0].attend(ctx)
    keys, values = (
        torch.stack(x) for x in zip(*(cases[0].whole(r, length) for r in range(batch)), strict=True)
    )
    query = cases[0].q[:, :, None]

    def by_torch(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        parts = (x.to(dtype) for x in (query, keys, values))
        return scaled_dot_product_attention(*parts, scale=SCALE, enable_gqa=True)

    check("decode", cases[0].out, by_torch(torch.float32)[:, :, 0], 1e-2)
    ours = time_graph([lambda case=case: case.attend(ctx) for case in cases])
    theirs = time_graph([by_torch])
    case = cases[0]
    rival = by_flashinfer(
        "decode",
        lambda module: decode_attention(module, case.q, case.keys, case.values, case.plan, SCALE),
        case.out,
        1e-2,
    )
    floor_us = 1e6 * 2 * keys.nbytes / copy_bandwidth()
    return figures("decode", ours, theirs, floor_us) | {"flashinfer_us": rival}


def prefill(ctx: cuda.ExecutionContext, length: int = 8192) -> dict[str, float | str]:
    case = Case([length], [length])
    case.attend(ctx)
    keys, values = (x[None] for x in case.whole(0, length))
    query = case.q.transpose(0, 1)[None]

    def by_torch() -> torch.Tensor:
        return scaled_dot_product_attention(query, keys, values, is_causal=True, scale=SCALE, enable_gqa=True)

    check("prefill", case.out, by_torch()[0].transpose(0, 1), 2e-2)
    ours, theirs = time_graph([lambda: case.attend(ctx)]), time_graph([by_torch])
    rival = by_flashinfer(
        "prefill",
        lambda module: prefill_attention(module, case.q, case.keys, case.values, case.plan, SCALE),
        case.out,
        2e-2,
    )
    floor_us = 1e6 * 4 * HEADS * DIM * length * (length + 1) / 2 / product_rate()
    return figures("prefill", ours, theirs, floor_us) | {"flashinfer_us": rival}


def figures(name: str, ours: Timing, theirs: Timing, floor_us: float) -> dict[str, float]:
    share = floor_us / ours.median_us
    print(f"{name:8} {ours}  torch {theirs}  limit {floor_us:.1f} us, {100 * share:.0f} % of it")
    return {"us": ours.median_us, "torch_us": theirs.median_us, "share": share}


if __name__ == "__main__":
    need_gpu()
    torch.manual_seed(0)
    context = cuda.ExecutionContext()
    report("gpu_attention", {"decode": decode(context), "prefill": prefill(context)})
