"""layer_norm against its reference, on every instruction set of the machine."""

from __future__ import annotations

import pytest
import torch

from engine.errors import NativeError
from engine.ops import reference
from engine.ops.layer_norm import layer_norm
from helpers.compare import GuardedOutput, assert_close, assert_same_bits, sum_bound
from helpers.native import FMA_ISAS, ISAS, context

SIZES = [1, 15, 16, 17, 64, 100, 384]


def bound(x: torch.Tensor, expected: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A distance to the mean loses n + 2 roundings of the largest |x|, all of which the scale stretches;
    the variance and the products add what they add to a plain norm."""
    n = x.shape[-1]
    wide = x.double()
    scale = (wide.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
    lost = sum_bound(wide.abs().amax(-1, keepdim=True) * scale * weight.abs(), n + 2)
    return 2 * lost + sum_bound(expected.abs() + bias.abs(), n + 8)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("isa", ISAS)
def test_layer_norm_is_the_reference(isa, n, has_bias):
    torch.manual_seed(n)
    x, weight, bias = torch.randn(9, n + 2)[:, 1 : n + 1] * 3 + 1, torch.randn(n), torch.randn(n)
    out, expected = GuardedOutput(9, n), torch.empty(9, n, dtype=torch.float64)
    layer_norm(context(isa), x, None, weight, bias if has_bias else None, 1e-5, out.tensor)
    reference.layer_norm(None, x, None, weight, bias if has_bias else None, 1e-5, expected)
    assert_close(out.tensor, expected, bound(x, expected, weight, bias))
    out.assert_untouched_outside()


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("isa", ISAS)
def test_with_a_residual(isa, in_place):
    """Encoders that normalise after each block write over the residual."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 100), torch.randn(100), torch.randn(100)
    residual = torch.randn(5, 107)[:, 3:103]
    total = x + residual
    out, expected = residual if in_place else torch.empty(5, 100), torch.empty(5, 100, dtype=torch.float64)
    layer_norm(context(isa), x, residual, weight, bias, 1e-5, out)
    reference.layer_norm(None, total, None, weight, bias, 1e-5, expected)
    assert_close(out, expected, bound(total, expected, weight, bias))
    if not in_place:
        assert_same_bits(residual, total)


def test_bits_do_not_depend_on_batch_threads_or_instruction_set():
    torch.manual_seed(1)
    x, weight, bias = torch.randn(50, 333), torch.randn(333), torch.randn(333)
    whole = torch.empty_like(x)
    layer_norm(context(FMA_ISAS[-1], 3), x, None, weight, bias, 1e-6, whole)
    for isa in FMA_ISAS:
        for row in range(len(x)):
            alone = torch.empty(1, 333)
            layer_norm(context(isa, 1), x[row : row + 1], None, weight, bias, 1e-6, alone)
            assert_same_bits(alone, whole[row : row + 1])


def test_a_constant_row_is_the_bias():
    out = torch.zeros(2, 20)
    layer_norm(
        context(ISAS[-1]), torch.full((2, 20), 7.0), None, torch.ones(20), torch.arange(20.0), 1e-12, out
    )
    assert (out == torch.arange(20.0)).all()


def test_no_rows_and_wrong_shapes():
    empty = torch.empty(0, 8)
    layer_norm(context(ISAS[-1]), empty, None, torch.ones(8), None, 1e-6, empty)
    with pytest.raises(NativeError, match=r"residual: expected \[T=2, n=8\], got \[3, 8\]"):
        layer_norm(
            context(ISAS[-1]),
            torch.zeros(2, 8),
            torch.zeros(3, 8),
            torch.ones(8),
            None,
            1e-6,
            torch.zeros(2, 8),
        )
    with pytest.raises(NativeError, match=r"bias: expected \[n=8\], got \[7\]"):
        layer_norm(
            context(ISAS[-1]), torch.zeros(2, 8), None, torch.ones(8), torch.ones(7), 1e-6, torch.zeros(2, 8)
        )
