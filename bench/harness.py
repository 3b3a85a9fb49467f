"""What every bench shares: repeated timing, the machine it ran on, and the result line.

A bench checks its results first, then times. Its last output line is one JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns
from typing import Any


@dataclasses.dataclass(frozen=True)
class Timing:
    """Time of one call over several repeats, in microseconds: the median, and how far the
    quartiles lie apart as a share of it."""

    median_us: float
    spread: float

    @classmethod
    def of(cls, samples_us: list[float]) -> Timing:
        low, middle, high = statistics.quantiles(samples_us, n=4)
        return cls(middle, (high - low) / middle)

    def __str__(self) -> str:
        return f"{self.median_us:9.2f} µs ± {50 * self.spread:.0f}%"


def time_calls(
    call: Callable[[], object],
    *,
    calls: int,
    repeats: int = 30,
    warm_up: int = 3,
    clock: Callable[[], int] = perf_counter_ns,
) -> Timing:
    """Times `calls` calls at a stretch, `repeats` times after `warm_up` unmeasured stretches.

    `clock`, in nanoseconds: `time.thread_time_ns` for calls that nothing but the caller's thread works on,
    so that whoever else has the core meanwhile is not counted.
    """
    samples = []
    for repeat in range(warm_up + repeats):
        begin = clock()
        for _ in range(calls):
            call()
        elapsed_ns = clock() - begin
        if repeat >= warm_up:
            samples.append(elapsed_ns / calls / 1000)
    return Timing.of(samples)


def time_each(prepare: Callable[[int], Any], call: Callable[[Any], object], *, calls: int) -> Timing:
    """Times single calls, each after its own unmeasured `prepare(i)`; for calls that must find cold
    memory. The clock itself is measured and taken off."""
    clock_ns = statistics.median(-(perf_counter_ns() - perf_counter_ns()) for _ in range(1000))
    samples = []
    for i in range(calls):
        argument = prepare(i)
        begin = perf_counter_ns()
        call(argument)
        samples.append((perf_counter_ns() - begin - clock_ns) / 1000)
    return Timing.of(samples)


def machine() -> dict[str, Any]:
    """The machine, and how busy it was with other things."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    except OSError:
        pass
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }


def exit_status(results: dict[str, dict[str, Any]]) -> int:
    """1 if a result says that its bound was not `reached`, which a script can then ask for."""
    return int(any(not result.get("reached", True) for result in results.values()))


def report(bench: str, results: dict[str, Any]) -> None:
    """Print the result line; nothing may be printed after it."""
    print(json.dumps({"bench": bench, "machine": machine(), **results}), flush=True)
