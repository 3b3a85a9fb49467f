"""What is launched on a GPU compiles for it, fits its memory, and spills next to nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED_BYTES = {"sm_80": 166_912, "sm_86": 101_376, "sm_89": 101_376, "sm_90": 232_448}
"""Of a block. Source: CUDA C++ Programming Guide, technical specifications per compute capability."""
MOST_SPILLED = 64


def compiled(isa: str, *cases: str) -> list[dict]:
    """In a process of its own: where kernels are interpreted, they cannot be compiled."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "bench" / "kernels" / "report_triton.py"), "--isa", isa]
    run = subprocess.run(
        [*command, *(("--only", *cases) if cases else ())], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert not run.stderr, run.stderr
    return json.loads(run.stdout.splitlines()[-1])["kernels"][isa]


def check(kernels: list[dict], isa: str) -> None:
    for kernel in kernels:
        assert kernel["shared_bytes"] <= SHARED_BYTES[isa], kernel
        assert kernel["spilled_bytes"] <= MOST_SPILLED, kernel


def test_a_hopper_gpu_gets_its_own_products() -> None:
    kernels = compiled(
        "sm_90", "prefill, head dim 128", "int4 weights, groups of 128", "adapters", "bfloat16", "embedding"
    )
    check(kernels, "sm_90")
    assert len(kernels) == 3 + 3 + 3 + 1 + 1
    assert all(kernel["products"] == "wgmma" for kernel in kernels if kernel["kernel"] == "prefill_kernel")


def test_a_small_gpu_has_the_memory() -> None:
    kernels = compiled("sm_86", "prefill, head dim 256", "int4 weights, groups of 128, 64", "fp8 weights, 16")
    check(kernels, "sm_86")
    assert {kernel["products"] for kernel in kernels} == {"mma.sync"}


@pytest.mark.slow
@pytest.mark.parametrize("isa", SHARED_BYTES)
def test_every_kernel_for_every_gpu(isa) -> None:
    check(compiled(isa), isa)
