"""Cores and memory as an affinity mask and either kind of cgroup leave them."""

from __future__ import annotations

import os

import pytest

from engine.runner.hardware import available_memory_bytes, usable_cores

CORES = len(os.sched_getaffinity(0))
GIB = 2**30
FULL_OF_FILES = {"memory.max": f"{3 * GIB}\n", "memory.current": f"{3 * GIB}\n"}


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, CORES),
        ({"cpu.max": "max 100000\n"}, CORES),
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "190000 100000\n"}, 1),
        ({"cpu.max": "100000000 100000\n"}, CORES),
        ({"cpu.max": "nonsense"}, CORES),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, CORES),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
    ],
)
def test_cores(tmp_path, files, expected):
    write(tmp_path, files)
    assert usable_cores(tmp_path) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8 * GIB),
        ({"memory.max": "max\n", "memory.current": "5\n"}, 8 * GIB),
        ({"memory.max": f"{3 * GIB}\n", "memory.current": f"{GIB}\n"}, 2 * GIB),
        ({"memory.max": f"{GIB}\n", "memory.current": f"{2 * GIB}\n"}, 0),
        ({"memory.max": f"{100 * GIB}\n", "memory.current": "0\n"}, 8 * GIB),
        ({"memory/memory.limit_in_bytes": f"{GIB}\n", "memory/memory.usage_in_bytes": "0\n"}, GIB),
        ({**FULL_OF_FILES, "memory.stat": f"anon {GIB}\nactive_file {GIB}\ninactive_file 5\n"}, GIB + 5),
        ({**FULL_OF_FILES, "memory.stat": f"active_file {9 * GIB}\ninactive_file 0\n"}, 3 * GIB),
        ({**FULL_OF_FILES, "memory.stat": "nonsense"}, 0),
        (
            {
                "memory/memory.limit_in_bytes": f"{3 * GIB}\n",
                "memory/memory.usage_in_bytes": f"{3 * GIB}\n",
                "memory/memory.stat": f"inactive_file 7\ntotal_active_file 0\ntotal_inactive_file {GIB}\n",
            },
            GIB,
        ),
    ],
)
def test_memory(tmp_path, files, expected):
    write(tmp_path, files)
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: 99 kB\nMemFree: 7 kB\nMemAvailable:   {8 * GIB // 1024} kB\n")
    assert available_memory_bytes(tmp_path, meminfo) == expected


def test_this_machine():
    assert 1 <= usable_cores() <= CORES
    assert available_memory_bytes() > 0
