"""What part of a process' CPU time native kernels take, as the engine reckons it."""

from __future__ import annotations

import pytest

from engine.core.cpu_clock import CpuClock, process_cpu_s


def test_time_in_kernels_is_cut_where_the_thread_lost_its_core() -> None:
    now = {"wall": 10.0, "cpu": 3.0, "caller": 1.0, "workers": 2.0}
    clock = CpuClock(
        lambda: (now["caller"], now["workers"]), clock=lambda: now["wall"], thread_cpu=lambda: now["cpu"]
    )
    assert clock.kernel_cpu_s() == 0

    def after(wall: float, cpu: float, caller: float, workers: float, slept: float = 0.0) -> float:
        for name, more in (("wall", wall), ("cpu", cpu), ("caller", caller), ("workers", workers)):
            now[name] += more
        clock.slept_s += slept
        return clock.kernel_cpu_s()

    assert after(wall=2, cpu=2, caller=1, workers=0.5) == 1.5, "a whole core"
    assert after(wall=2, cpu=1, caller=1, workers=0.5) == pytest.approx(1.5 + 0.5 + 0.5), "half of one"
    assert after(wall=12, cpu=2, caller=1, workers=0, slept=10) == pytest.approx(2.5 + 1), "sleep is no loss"
    assert after(wall=1, cpu=1.1, caller=1, workers=0) == pytest.approx(3.5 + 1), (
        "never more than the clock says"
    )
    assert after(wall=0, cpu=0, caller=0, workers=0) == pytest.approx(4.5)


def test_the_time_of_this_process() -> None:
    before = process_cpu_s()
    while process_cpu_s() < before + 0.02:
        pass
