"""What crossing into native code costs: a call with five tensors, and what of it is no tensor.

    python bench/kernels/bench_boundary.py

The tensors are so small that the work is nothing beside the call, and one thread does it: nothing is
handed to others, and the time is that of its CPU clock. "floor" is a native call without tensors and without
work, `tree.path_len(0)`.
Ends with status 1 where the native call with five tensors takes more than 1 µs in the median.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from time import thread_time_ns

import numpy as np
import torch

from engine import _native
from engine.ops import native as ops

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import exit_status, machine, report, time_calls

MOST_US = 1.0
"""For the native call with five torch tensors."""


def rope_arguments() -> tuple[torch.Tensor, ...]:
    """One token, one head of two elements, turned by a quarter: (x, y) becomes (-y, x)."""
    q, k = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 4.0]]])
    return q, k, torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(1, dtype=torch.int32)


def verify(ctx: _native.ExecutionContext) -> None:
    arguments = rope_arguments()
    ops.rope(ctx, *arguments)
    assert arguments[0].tolist() == [[[-2.0, 1.0]]] and arguments[1].tolist() == [[[-4.0, 3.0]]]


def calls(ctx: _native.ExecutionContext) -> dict[str, Callable[[], object]]:
    tensors = rope_arguments()
    parameters = [torch.nn.Parameter(tensor, requires_grad=False) for tensor in tensors]
    arrays = [tensor.numpy() for tensor in tensors]
    tree = _native.RadixTree(_native.BlockAllocator(1), 1)
    empty = np.empty(0, np.int32)
    return {
        "floor": lambda: tree.path_len(0),
        "one int32 array": lambda: tree.match_length("", empty),
        "five tensors": lambda: _native.rope(ctx, *tensors),
        "five tensors, ops.rope": lambda: ops.rope(ctx, *tensors),
        "five parameters": lambda: _native.rope(ctx, *parameters),
        "five numpy arrays": lambda: _native.rope(ctx, *arrays),
    }


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    print(machine())
    ctx = _native.ExecutionContext(1)
    verify(ctx)
    results: dict[str, dict[str, object]] = {}
    for name, call in calls(ctx).items():
        timing = time_calls(call, calls=5000, clock=thread_time_ns)
        print(f"{name:24} {timing}", flush=True)
        results[name] = {"us": round(timing.median_us, 3), "spread": round(timing.spread, 2)}
    five_us = results["five tensors"]["us"]
    results["five tensors"] |= {"most_us": MOST_US, "reached": five_us <= MOST_US}
    report("boundary", {"results": results})
    return exit_status(results)


if __name__ == "__main__":
    sys.exit(main())
