"""What the machine offers this process: cores and memory, as limited by affinity and cgroups."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


def usable_cores(cgroup: Path = CGROUP_ROOT) -> int:
    """Cores that this process may keep busy: its affinity mask, cut to the cgroup's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota(cgroup)
    return cores if quota is None else max(1, min(cores, math.floor(quota)))


def available_memory_bytes(cgroup: Path = CGROUP_ROOT, meminfo: Path = MEMINFO) -> int:
    """Memory that can be taken without swapping: free on the machine, and left in the cgroup."""
    free = next(
        int(line.split()[1]) * 1024
        for line in meminfo.read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    limits = (
        (cgroup / "memory.max", cgroup / "memory.current"),
        (cgroup / "memory/memory.limit_in_bytes", cgroup / "memory/memory.usage_in_bytes"),
    )
    for limit_path, usage_path in limits:
        limit, usage = _read_integer(limit_path), _read_integer(usage_path)
        if limit is not None and usage is not None:
            free = min(free, max(0, limit - usage))
    return free


def _cpu_quota(cgroup: Path) -> float | None:
    """Cores' worth of time that the cgroup grants (version 2, else 1); None without a limit."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    quota_us = _read_integer(cgroup / "cpu/cpu.cfs_quota_us")
    period_us = _read_integer(cgroup / "cpu/cpu.cfs_period_us")
    return quota_us / period_us if quota_us and period_us and quota_us > 0 else None


def _read_integer(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
