"""CPU time of the engine's process, and how much of it native kernels take."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable


class CpuClock:
    """Made and read by the thread that steps the engine. `read_kernels` gives two times so far, in seconds:
    of that thread in kernels, by the clock, and CPU time of the kernels' own threads.

    A thread's own CPU clock is too dear to be read around every kernel. So where the stepping thread
    lost its core for part of its waking time, it is taken to have lost the same part in kernels.
    """

    def __init__(
        self,
        read_kernels: Callable[[], tuple[float, float]],
        clock: Callable[[], float] = time.monotonic,
        thread_cpu: Callable[[], float] = lambda: _cpu_s(resource.RUSAGE_THREAD),
    ) -> None:
        self.slept_s = 0.0
        """To be counted up by whoever lets the thread sleep."""
        self._read_kernels, self._clock, self._thread_cpu = read_kernels, clock, thread_cpu
        self._kernel_cpu_s = 0.0
        self._last = self._now()

    def kernel_cpu_s(self) -> float:
        """CPU time of kernels since this was made."""
        last, self._last = self._last, self._now()
        awake_s, loop_cpu_s, caller_s, workers_s = (
            now - then for now, then in zip(self._last, last, strict=True)
        )
        share = min(1.0, loop_cpu_s / awake_s) if awake_s > 0 else 1.0
        self._kernel_cpu_s += caller_s * share + workers_s
        return self._kernel_cpu_s

    def _now(self) -> tuple[float, float, float, float]:
        return (self._clock() - self.slept_s, self._thread_cpu(), *self._read_kernels())


def process_cpu_s() -> float:
    """CPU time of this process, user and system."""
    return _cpu_s(resource.RUSAGE_SELF)


def _cpu_s(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime
