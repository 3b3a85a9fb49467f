"""Execution contexts for tests of native ops."""

from __future__ import annotations

import functools

from engine import _native

ISAS = _native.available_isas()
# Instruction sets whose fma is fused: these give bitwise equal results.
FMA_ISAS = [isa for isa in ISAS if isa != "baseline"]


@functools.cache
def context(isa: str, num_threads: int = 2, rounds_attention: bool = False) -> _native.ExecutionContext:
    """One context per instruction set, number of threads and way of attention, shared by all tests."""
    return _native.ExecutionContext(num_threads, isa, rounds_attention)
