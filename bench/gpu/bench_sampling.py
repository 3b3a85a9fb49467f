"""Sampling 64 rows of a vocabulary of 128,256 with top-p, beside torch.topk and, if installed, flashinfer.

    python bench/gpu/bench_sampling.py

Tokens are checked against the CPU's kernel first: the same seeds and logits give the same tokens, but where
two candidates lie within 1e-5 of the drawn threshold, which one row in a thousand may do. Its limit is
reading the logits once at the measured bandwidth of a copy. The last line is one JSON object.
"""

from __future__ import annotations

import sys

import torch
from device import copy_bandwidth, need_gpu, report, time_graph
from rivals import by_flashinfer

from engine.ops import cuda, native
from engine.ops.sampling import SamplingTensors

ROWS, VOCAB = 64, 128_256


def make_tensors(logits: torch.Tensor, seed: int) -> SamplingTensors:
    device = logits.device

    def full(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full((ROWS,), value, dtype=dtype, device=device)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    none = torch.zeros(ROWS + 1, dtype=torch.int64, device=device)
    return SamplingTensors(
        logits=logits,
        workspace=empty(ROWS, VOCAB),
        seen=empty(ROWS, -(-VOCAB // 32), dtype=torch.int32),
        temperature=full(0.8),
        top_k=full(-1, torch.int32),
        top_p=full(0.95),
        min_p=full(0.0),
        repetition_penalty=full(1.0),
        frequency_penalty=full(0.0),
        presence_penalty=full(0.0),
        seeds=torch.arange(seed, seed + ROWS, device=device),
        choices=full(0, torch.int32),
        positions=full(0, torch.int64),
        token_ids=empty(0, dtype=torch.int32),
        token_indptr=none,
        prompt_lens=full(0, torch.int32),
        bias_ids=empty(0, dtype=torch.int32),
        bias_values=empty(0),
        bias_indptr=none,
        bitmask=None,
        num_top_logprobs=full(-1, torch.int32),
        out_ids=full(-2, torch.int32),
        out_logprobs=empty(ROWS),
        top_ids=empty(ROWS, 0, dtype=torch.int32),
        top_logprobs=empty(ROWS, 0),
    )


def main() -> None:
    need_gpu()
    ctx, cpu = cuda.ExecutionContext(), native.ExecutionContext(num_threads=4)
    torch.manual_seed(0)
    sets = [4 * torch.randn(ROWS, VOCAB, device="cuda") for _ in range(4)]
    num_wrong = 0
    for index, logits in enumerate(sets):
        ours, theirs = make_tensors(logits.clone(), 100 * index), make_tensors(logits.cpu(), 100 * index)
        cuda.sample(ctx, ours)
        native.sample(cpu, theirs)
        num_wrong += int((ours.out_ids.cpu() != theirs.out_ids).sum())
    if num_wrong > 1:
        sys.exit(f"sampling is wrong: {num_wrong} of {len(sets) * ROWS} tokens differ from the CPU's")
    tensors = [make_tensors(logits, index) for index, logits in enumerate(sets)]
    ours = time_graph([lambda t=t: cuda.sample(ctx, t) for t in tensors])
    theirs = time_graph([lambda x=x: x.topk(50) for x in sets])
    rival = by_flashinfer(
        "sampling",
        lambda module: lambda: module.sampling.top_p_sampling_from_probs((sets[0] / 0.8).softmax(-1), 0.95),
    )
    floor_us = 1e6 * sets[0].nbytes / copy_bandwidth()
    print(f"sampling {ours}  torch.topk(50) {theirs}  limit {floor_us:.1f} us")
    results = {"us": ours.median_us, "topk_us": theirs.median_us, "share": floor_us / ours.median_us}
    results |= {"flashinfer_us": rival}
    report("gpu_sampling", {"sampling": results, "wrong": num_wrong})


if __name__ == "__main__":
    main()
