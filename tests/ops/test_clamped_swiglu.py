"""clamped_swiglu against its reference, on every instruction set of the machine."""

from __future__ import annotations

import pytest
import torch

from engine.errors import NativeError
from engine.ops import reference
from engine.ops.clamped_swiglu import clamped_swiglu
from helpers.compare import EPSILON, GuardedOutput, assert_close, assert_same_bits
from helpers.native import FMA_ISAS, ISAS, context

ALPHA, LIMIT = 1.702, 7.0


def inputs(num_rows: int, n: int) -> torch.Tensor:
    """Numbers on both sides of both limits, and of every size."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(num_rows, 2 * n, generator=generator) * 6
    tiny = torch.logspace(-38, 30, num_rows * 2 * n).view(num_rows, 2 * n)
    sign = torch.where(torch.rand(x.shape, generator=generator) < 0.5, -1.0, 1.0)
    return torch.where(torch.rand(x.shape, generator=generator) < 0.3, tiny * sign, x)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 1000])
@pytest.mark.parametrize("isa", ISAS)
def test_op_is_the_reference(isa, n):
    gate_up = GuardedOutput(7, 2 * n).tensor.copy_(inputs(7, n))
    out, expected = GuardedOutput(7, n), torch.empty(7, n, dtype=torch.float64)
    clamped_swiglu(context(isa), gate_up, ALPHA, LIMIT, out.tensor)
    reference.clamped_swiglu(None, gate_up, ALPHA, LIMIT, expected)
    # The roundings of the chain, and that of the exponent, which weighs as much as the exponent is large;
    # up + 1 cancels near -1, and what the kernel takes for zero is below 1e-36.
    gate, up = gate_up.double().chunk(2, -1)
    exponent = (ALPHA * gate.clamp(-60, LIMIT)).abs()
    swish = (expected / (up.clamp(-LIMIT, LIMIT) + 1)).abs().nan_to_num(0.0)
    bound = expected.abs() * (8 + 4 * exponent) * EPSILON + swish * EPSILON + 1e-34
    assert_close(out.tensor, expected, bound)
    out.assert_untouched_outside()


def test_bits_do_not_depend_on_batch_threads_or_instruction_set():
    gate_up = inputs(20, 133)
    whole = torch.empty(20, 133)
    clamped_swiglu(context(FMA_ISAS[-1], 3), gate_up, ALPHA, LIMIT, whole)
    for isa in FMA_ISAS:
        for row in range(20):
            alone = torch.empty(1, 133)
            clamped_swiglu(context(isa, 1), gate_up[row : row + 1], ALPHA, LIMIT, alone)
            assert_same_bits(alone, whole[row : row + 1])


def test_wrong_arguments():
    ctx = context(ISAS[-1])
    clamped_swiglu(ctx, torch.empty(0, 8), ALPHA, LIMIT, torch.empty(0, 4))
    with pytest.raises(NativeError, match=r"gate_up: expected \[T=2, 8\], got \[2, 9\]"):
        clamped_swiglu(ctx, torch.zeros(2, 9), ALPHA, LIMIT, torch.zeros(2, 4))
    with pytest.raises(NativeError, match="alpha: expected a positive number"):
        clamped_swiglu(ctx, torch.zeros(2, 8), -1.0, LIMIT, torch.zeros(2, 4))
    with pytest.raises(NativeError, match="limit: expected a positive number"):
        clamped_swiglu(ctx, torch.zeros(2, 8), ALPHA, float("inf"), torch.zeros(2, 4))
