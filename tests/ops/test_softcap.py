"""softcap against its reference, on every instruction set of the machine."""

from __future__ import annotations

import pytest
import torch

from engine.errors import NativeError
from engine.ops import reference
from engine.ops.softcap import softcap
from helpers.compare import EPSILON, GuardedOutput, assert_close, assert_same_bits
from helpers.native import FMA_ISAS, ISAS, context


def inputs(num_rows: int, n: int) -> torch.Tensor:
    """Numbers of every size and sign, most of them near the bound."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(num_rows, n, generator=generator) * 40
    tiny = torch.logspace(-38, 2, num_rows * n).view(num_rows, n)
    return torch.where(torch.rand(num_rows, n, generator=generator) < 0.3, tiny, x)


@pytest.mark.parametrize("cap", [0.5, 30.0, 1e4])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 1000])
@pytest.mark.parametrize("isa", ISAS)
def test_op_is_the_reference(isa, n, cap):
    x, guarded = inputs(5, n), GuardedOutput(5, n)
    guarded.tensor.copy_(x)
    expected = x.double()
    reference.softcap(None, expected, cap)
    softcap(context(isa), guarded.tensor, cap)
    # The quotient, a few units of tanh's last place, and the product.
    assert_close(guarded.tensor, expected, 8 * EPSILON * expected.abs() + 1e-37)
    guarded.assert_untouched_outside()


def test_bits_do_not_depend_on_batch_threads_or_instruction_set():
    x = inputs(20, 133)
    whole = x.clone()
    softcap(context(FMA_ISAS[-1], 3), whole, 30.0)
    for isa in FMA_ISAS:
        for row in range(20):
            alone = x[row : row + 1].clone()
            softcap(context(isa, 1), alone, 30.0)
            assert_same_bits(alone, whole[row : row + 1])


@pytest.mark.parametrize("isa", ISAS)
def test_the_ends_are_the_limits(isa):
    infinity = float("inf")
    x = torch.tensor([[infinity, -infinity, 0.0, 3e38, float("nan")]])
    softcap(context(isa), x, 30.0)
    assert x[0, :4].tolist() == [30.0, -30.0, 0.0, 30.0]
    assert x[0, 4].isnan()


@pytest.mark.parametrize("cap", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bound_that_is_none_is_refused(cap):
    with pytest.raises(NativeError, match="cap: expected a positive number"):
        softcap(context(ISAS[-1]), torch.zeros(1, 4), cap)


def test_empty():
    softcap(context(ISAS[-1]), torch.zeros(0, 4), 1.0)
    softcap(context(ISAS[-1]), torch.zeros(2, 0), 1.0)
