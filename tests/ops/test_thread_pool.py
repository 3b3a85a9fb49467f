"""The threads that share the work of an op, from outside: they come when there is some, and then rest."""

from __future__ import annotations

import time

import pytest
import torch

from engine import _native
from engine.errors import NativeError
from engine.ops.linear import PackedMatrix, linear

NUM_THREADS = 3
DEADLINE_S = 60.0
LOOK_S = 0.02


def multiply(ctx: _native.ExecutionContext) -> None:
    matrix = PackedMatrix(4096, 512, "float32")
    matrix.pack_rows(ctx, 0, torch.ones(4096, 512))
    linear(ctx, torch.ones(64, 512), matrix, None, torch.empty(64, 4096))


def test_threads_take_part_and_then_use_no_time():
    """Threads that went on spinning would take a core each from whoever else wants it."""
    ctx = _native.ExecutionContext(NUM_THREADS)
    deadline = time.monotonic() + DEADLINE_S
    while ctx.kernel_seconds[1] < 0.01:  # of the other two
        assert time.monotonic() < deadline, "nobody else took part"
        multiply(ctx)
    caller_s, before_s = ctx.kernel_seconds
    assert caller_s > 0
    while True:
        time.sleep(LOOK_S)
        now_caller_s, now_s = ctx.kernel_seconds
        assert now_caller_s == caller_s, "nothing was asked for"
        if now_s == before_s:
            break
        assert time.monotonic() < deadline, "they spin for ever"
        before_s = now_s


def test_they_come_again_after_a_rest():
    ctx = _native.ExecutionContext(NUM_THREADS)
    for _ in range(3):
        multiply(ctx)
        rested_s, deadline = None, time.monotonic() + DEADLINE_S
        while ctx.kernel_seconds[1] != rested_s:
            assert time.monotonic() < deadline
            rested_s = ctx.kernel_seconds[1]
            time.sleep(LOOK_S)
        while ctx.kernel_seconds[1] == rested_s:
            assert time.monotonic() < deadline, "nobody woke"
            multiply(ctx)


def test_one_thread_is_the_callers_own():
    ctx = _native.ExecutionContext(1)
    multiply(ctx)
    caller_s, others_s = ctx.kernel_seconds
    assert caller_s > 0 and others_s == 0
    for wrong in (0, -1, 1025):
        with pytest.raises(NativeError, match=f"num_threads: expected 1 to 1024, got {wrong}"):
            _native.ExecutionContext(wrong)
