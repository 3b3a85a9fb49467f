"""What the benches of the GPU share: timing by device events, and the limits of the card, measured."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import Timing, machine

from engine.errors import ConfigError
from engine.runner.gpu import Gpu

COPY_BYTES = 1 << 30
PRODUCT_SIZE = 8192


def need_gpu() -> None:
    """Ends the bench with one line, what is missing, where it cannot run."""
    try:
        Gpu.this()
    except ConfigError as error:
        sys.exit(error.message)


def time_graph(calls: Sequence[Callable[[], object]], *, repeats: int = 50) -> Timing:
    """One call's time, by events around replays of a captured graph of all of them.

    Launches from the host are left out, as they are from a captured step. Calls on inputs of their own, which
    together are larger than the cache of the card, find it cold.
    """
    for call in calls:  # compiles, and allocates what stays
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    samples = []
    for repeat in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if repeat >= 3:
            samples.append(1e3 * begin.elapsed_time(end) / len(calls))
    return Timing.of(samples)


def copy_bandwidth() -> float:
    """Bytes a second, those read and those written, of a copy far larger than the cache."""
    source = torch.randint(0, 255, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / (time_graph([lambda: target.copy_(source)], repeats=20).median_us * 1e-6)


def product_rate() -> float:
    """Operations a second of a dense bfloat16 product of random matrices, by torch."""
    a, b = (torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    seconds = time_graph([lambda: torch.mm(a, b, out=out)], repeats=20).median_us * 1e-6
    return 2 * PRODUCT_SIZE**3 / seconds


def check(name: str, ours: torch.Tensor, expected: torch.Tensor, most: float) -> None:
    """Ends the bench where the relative error of a result is larger than `most`, or a number is none."""
    error = relative_error(ours, expected)
    if not error <= most:
        sys.exit(f"{name} is wrong: relative error {error:.3g}, at most {most:g} expected")


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours.double() - expected.double()).norm() / expected.double().norm())


def report(bench: str, results: dict[str, Any]) -> None:
    """The last line: one JSON object."""
    card = torch.cuda.get_device_name()
    print(json.dumps({"bench": bench, "gpu": card, "torch": torch.__version__, **machine(), **results}))


def median(samples: Sequence[float]) -> float:
    return statistics.median(samples)
