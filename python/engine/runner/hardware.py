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
    """Memory that can be taken without swapping: free on the machine, and left in the cgroup.

    Cached pages of files, as of a checkpoint just downloaded, are charged to the cgroup but make room.
    """
    free = next(
        int(line.split()[1]) * 1024
        for line in meminfo.read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    versions = (
        (cgroup, "memory.max", "memory.current", ""),
        (cgroup / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    )
    for folder, limit_name, usage_name, prefix in versions:
        limit, usage = _read_integer(folder / limit_name), _read_integer(folder / usage_name)
        if limit is not None and usage is not None:
            cached = _cached_file_bytes(folder / "memory.stat", prefix)
            free = min(free, max(0, limit - max(0, usage - cached)))
    return free


def _cached_file_bytes(stat: Path, prefix: str) -> int:
    """Pages of files that a cgroup holds and the kernel can drop; 0 where it does not tell."""
    try:
        counts = dict(line.split() for line in stat.read_text().splitlines())
        return sum(int(counts[f"{prefix}{name}"]) for name in ("active_file", "inactive_file"))
    except (OSError, ValueError, KeyError):
        return 0


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
