"""Ops that compute little for each number they touch, against what the machine can read.

    python bench/kernels/bench_rows.py [--threads 2] [--isa auto] [--repeats 9]

Of qwen05's shape: norms, the activation between gate and up, rotation with the append to the cache (bfloat16
and int8), the embedding, and drawing one token of 151,936, greedy, by top-k and top-p and with the
log-probability. Operands are cold: calls go round more of them than any cache holds. "floor" is all that is
read and written at the measured rate of reading; the share is the floor divided by the measured median.
Filters pass over the logits several times, and an exponential of each takes longer than reading it: their
share says how much. Results are compared with the plain references first. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from engine import _native
from engine.ops import native as ops
from engine.ops import reference
from engine.ops.sampling import SamplingTensors

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import machine, report, time_calls
from limits import Limits

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB, BLOCK_SIZE = 896, 4864, 14, 2, 64, 151_936, 16
COLD_BYTES = 200_000_000
LARGEST_ERROR = 1e-5


class Case(NamedTuple):
    """One op on some rows. `make` gives the arguments of a call, of which `num_bytes` are read or written;
    the results are those at the places `written`."""

    name: str
    rows: int
    make: Callable[[], tuple[Any, ...]]
    op: Callable[..., None]
    plain: Callable[..., None]
    num_bytes: int
    written: tuple[int, ...]


def row_cases() -> Iterator[Case]:
    weight = torch.randn(HIDDEN)
    for rows in (16, 1024):
        yield norm_case("rms_norm", rows, weight, num_inputs=1, written=(3,))
        yield norm_case("add_rms_norm", rows, weight, num_inputs=2, written=(1, 4))
        yield gate_case(rows)
        for dtype in (torch.bfloat16, torch.int8):
            yield rope_case(rows, dtype)
        yield embedding_case(rows)


def norm_case(
    name: str, rows: int, weight: torch.Tensor, *, num_inputs: int, written: tuple[int, ...]
) -> Case:
    def make() -> tuple[Any, ...]:
        *inputs, out = torch.randn(num_inputs + 1, rows, HIDDEN)
        return *inputs, weight, 1e-6, out

    num_bytes = (num_inputs + len(written)) * rows * HIDDEN * 4
    return Case(name, rows, make, getattr(ops, name), getattr(reference, name), num_bytes, written)


def gate_case(rows: int) -> Case:
    def make() -> tuple[Any, ...]:
        return torch.randn(rows, 2 * INNER), torch.empty(rows, INNER)

    return Case("silu_mul", rows, make, ops.silu_mul, reference.silu_mul, 3 * rows * INNER * 4, (1,))


def rope_case(rows: int, dtype: torch.dtype) -> Case:
    blocks = -(-rows // BLOCK_SIZE)
    angles = torch.randn(rows, HEAD_DIM // 2)
    turn = angles.cos(), angles.sin(), torch.arange(rows, dtype=torch.int32)

    def make() -> tuple[Any, ...]:
        q, k, v = torch.randn(rows, HEADS + 2 * KV_HEADS, HEAD_DIM).split([HEADS, KV_HEADS, KV_HEADS], 1)
        keys = torch.zeros(blocks, KV_HEADS, HEAD_DIM, BLOCK_SIZE, dtype=dtype)
        values = torch.zeros(blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM, dtype=dtype)
        scales = torch.zeros(blocks, KV_HEADS, 2, BLOCK_SIZE) if dtype == torch.int8 else None
        return q, k, v, *turn, keys, values, torch.arange(rows), scales

    turned = 2 * rows * (HEADS + KV_HEADS) * HEAD_DIM * 4
    appended = rows * KV_HEADS * HEAD_DIM * (4 + 2 * dtype.itemsize)
    name = f"rope_append_kv {str(dtype).removeprefix('torch.')}"
    return Case(name, rows, make, ops.rope_append_kv, reference.rope_append_kv, turned + appended, (0, 1))


def embedding_case(rows: int) -> Case:
    weight = torch.randn(4096, HIDDEN).bfloat16()
    plain_matrix = reference.PackedMatrix(*weight.shape, "bfloat16")
    plain_matrix.pack_rows(None, 0, weight)
    matrix = ops.PackedMatrix(*weight.shape, "bfloat16")
    matrix.pack_rows(ops.ExecutionContext(1), 0, weight)

    def make() -> tuple[Any, ...]:
        return torch.randint(4096, (rows,), dtype=torch.int32), matrix, torch.empty(rows, HIDDEN)

    def plain(ctx: None, ids: torch.Tensor, _: Any, out: torch.Tensor) -> None:
        reference.embedding(ctx, ids, plain_matrix, out)

    return Case("embedding", rows, make, ops.embedding, plain, rows * HIDDEN * (2 + 4), (2,))


def sampling_case(name: str, rows: int, **wanted: float) -> Case:
    def make() -> tuple[SamplingTensors]:
        def full(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.full((rows,), value, dtype=dtype)

        none = torch.zeros(rows + 1, dtype=torch.int64)
        num_top = int(wanted.get("num_top", -1))
        return (
            SamplingTensors(
                logits=4 * torch.randn(rows, VOCAB),
                workspace=torch.empty(rows, VOCAB),
                seen=torch.empty(rows, -(-VOCAB // 32), dtype=torch.int32),
                temperature=full(wanted.get("temperature", 0.8)),
                top_k=full(int(wanted.get("top_k", -1)), torch.int32),
                top_p=full(wanted.get("top_p", 1.0)),
                min_p=full(0.0),
                repetition_penalty=full(1.0),
                frequency_penalty=full(0.0),
                presence_penalty=full(0.0),
                seeds=torch.arange(rows),
                choices=full(0, torch.int32),
                positions=full(0, torch.int64),
                token_ids=torch.empty(0, dtype=torch.int32),
                token_indptr=none,
                prompt_lens=full(0, torch.int32),
                bias_ids=torch.empty(0, dtype=torch.int32),
                bias_values=torch.empty(0),
                bias_indptr=none,
                bitmask=None,
                num_top_logprobs=full(num_top, torch.int32),
                out_ids=full(-2, torch.int32),
                out_logprobs=torch.zeros(rows),
                top_ids=torch.zeros(rows, max(num_top, 0), dtype=torch.int32),
                top_logprobs=torch.zeros(rows, max(num_top, 0)),
            ),
        )

    return Case(name, rows, make, ops.sample, reference.sample, rows * VOCAB * 4, ())


def sampling_cases() -> Iterator[Case]:
    for rows in (1, 16):
        yield sampling_case("greedy", rows, temperature=0.0)
        yield sampling_case("greedy, log-probability", rows, temperature=0.0, num_top=0)
        yield sampling_case("temperature", rows)
        yield sampling_case("top-k 50", rows, top_k=50)
        yield sampling_case("top-p 0.95", rows, top_p=0.95)


def check(ctx: _native.ExecutionContext, case: Case) -> None:
    """A wrong result is not worth timing."""
    ours = case.make()
    if isinstance(ours[0], SamplingTensors):
        case.op(ctx, *ours)
        drawn = ours[0].out_ids.clone()
        case.plain(None, *ours)
        assert torch.equal(drawn, ours[0].out_ids), f"{case.name}: other tokens than the reference's"
        return
    theirs = tuple(one.clone() if isinstance(one, torch.Tensor) else one for one in ours)
    case.op(ctx, *ours)
    case.plain(None, *theirs)
    for index in case.written:
        error = ((ours[index] - theirs[index]).abs().max() / theirs[index].abs().max()).item()
        assert error < LARGEST_ERROR, f"{case.name}: relative error {error}"


def measure(ctx: _native.ExecutionContext, case: Case, read_gbps: float, repeats: int) -> dict[str, Any]:
    check(ctx, case)
    num_copies = max(2, COLD_BYTES // case.num_bytes)
    calls = itertools.cycle([case.make() for _ in range(num_copies)])
    timing = time_calls(lambda: case.op(ctx, *next(calls)), calls=num_copies, repeats=repeats, warm_up=1)
    gbps = case.num_bytes / timing.median_us / 1e3
    return {
        "name": case.name,
        "rows": case.rows,
        "us": timing.median_us,
        "spread": timing.spread,
        "gbps": gbps,
        "share": gbps / read_gbps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.manual_seed(0)
    read_gbps = Limits(args.threads).read_gbps()
    ctx = _native.ExecutionContext(args.threads, args.isa)
    print(f"{machine()}\n{args.threads} threads, {ctx.isa}\nlimit: read {read_gbps:.1f} GB/s\n")
    print("op                        rows         us  spread    GB/s  share of limit")
    results = []
    for case in itertools.chain(row_cases(), sampling_cases()):
        row = measure(ctx, case, read_gbps, args.repeats)
        results.append(row)
        print(
            f"{row['name']:<25} {row['rows']:4d} {row['us']:10.2f}  {row['spread']:5.0%} {row['gbps']:8.2f}  "
            f"{row['share']:.0%}",
            flush=True,
        )
    report("rows", {"threads": args.threads, "isa": ctx.isa, "read_gbps": read_gbps, "ops": results})


if __name__ == "__main__":
    main()
