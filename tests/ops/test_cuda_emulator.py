"""The emulator of tests/cuda_host finds the faults that kernels are tested for by running on it."""

from __future__ import annotations

import math

import pytest

from engine.errors import NativeError
from helpers.cuda_host import emulated


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("skip_barrier", "threads wait for others that never come"),
        ("skip_shuffle", "threads wait for others that never come"),
        ("misalign", r"misaligned address: thread 0 of block \(0, 0, 0\)"),
        ("leave_shared", "wrote past the dynamic shared memory"),
    ],
)
def test_faults_end_the_launch_and_the_next_one_works(fault, message):
    for _ in range(2):
        with pytest.raises(NativeError, match=message):
            emulated().run_faulty(fault)
    emulated().run_faulty("forget_wait")


def test_copies_are_there_when_they_are_waited_for_and_not_before():
    before, after = emulated().run_faulty("forget_wait")
    assert math.isnan(before) and after == 0
