"""rms_norm and add_rms_norm against their reference, on every instruction set of the machine."""

from __future__ import annotations

import pytest
import torch

from engine.errors import NativeError
from engine.ops import reference
from engine.ops.rms_norm import add_rms_norm, rms_norm
from helpers.compare import GuardedOutput, assert_close, assert_same_bits, sum_bound
from helpers.native import FMA_ISAS, ISAS, context

SIZES = [1, 15, 16, 17, 64, 100, 896]


def bound(expected: torch.Tensor) -> torch.Tensor:
    """The sum of n squares under the root counts half; the root, two products, the mean and eps."""
    return sum_bound(expected.abs(), expected.shape[-1] // 2 + 8)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("isa", ISAS)
def test_rms_norm_is_the_reference(isa, n):
    torch.manual_seed(n)
    x, weight = torch.randn(9, n + 2)[:, 1 : n + 1] * 3, torch.randn(n)
    out, expected = GuardedOutput(9, n), torch.empty(9, n, dtype=torch.float64)
    rms_norm(context(isa), x, weight, 1e-5, out.tensor)
    reference.rms_norm(None, x, weight, 1e-5, expected)
    assert_close(out.tensor, expected, bound(expected))
    out.assert_untouched_outside()


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("isa", ISAS)
def test_add_rms_norm_is_the_reference(isa, n):
    torch.manual_seed(n)
    x, residual, weight = torch.randn(5, n), torch.randn(5, n + 7)[:, 3 : n + 3], torch.randn(n)
    total = x + residual
    out, expected = GuardedOutput(5, n), torch.empty(5, n, dtype=torch.float64)
    add_rms_norm(context(isa), x, residual, weight, 1e-6, out.tensor)
    reference.rms_norm(None, total, weight, 1e-6, expected)
    assert_same_bits(residual, total)
    assert_close(out.tensor, expected, bound(expected))
    out.assert_untouched_outside()


@pytest.mark.parametrize("isa", ISAS)
def test_heads_of_strided_rows_in_place(isa):
    """As query and key norms use it: on some columns of a wider matrix."""
    torch.manual_seed(0)
    rows = torch.randn(6, 200)
    kept, weight = rows.clone(), torch.randn(24)
    heads = rows[:, 50:122].unflatten(1, (3, 24))
    expected = torch.empty(6, 3, 24, dtype=torch.float64)
    reference.rms_norm(None, heads, weight, 1e-6, expected)
    rms_norm(context(isa), heads, weight, 1e-6, heads)
    assert_close(heads, expected, bound(expected))
    assert_same_bits(rows[:, :50], kept[:, :50])
    assert_same_bits(rows[:, 122:], kept[:, 122:])


def test_bits_do_not_depend_on_batch_threads_or_instruction_set():
    torch.manual_seed(1)
    x, weight = torch.randn(50, 333), torch.randn(333)
    whole = torch.empty_like(x)
    rms_norm(context(FMA_ISAS[-1], 3), x, weight, 1e-6, whole)
    for isa in FMA_ISAS:
        for row in range(len(x)):
            alone = torch.empty(1, 333)
            rms_norm(context(isa, 1), x[row : row + 1], weight, 1e-6, alone)
            assert_same_bits(alone, whole[row : row + 1])


def test_a_nan_stays_in_its_row():
    x = torch.ones(3, 20)
    x[1, 7] = float("nan")
    out = torch.zeros(3, 20)
    rms_norm(context(ISAS[-1]), x, torch.ones(20), 0.0, out)
    assert out[1].isnan().all() and (out[[0, 2]] == 1).all()


def test_no_rows():
    rms_norm(context(ISAS[-1]), torch.empty(0, 8), torch.ones(8), 1e-6, torch.empty(0, 8))
    rms_norm(context(ISAS[-1]), torch.empty(0, 2, 8), torch.ones(8), 1e-6, torch.empty(0, 2, 8))


@pytest.mark.parametrize(
    ("x", "out", "message"),
    [
        ((2, 3, 8), (2, 8), r"out: expected \[T=2, H=3, n=8\], got \[2, 8\]"),
        ((2, 8), (2, 3, 8), r"out: expected \[T=2, n=8\], got \[2, 3, 8\]"),
        ((2, 3, 2, 8), (2, 3, 2, 8), r"x: expected \[T, n\], got \[2, 3, 2, 8\]"),
    ],
)
def test_wrong_shapes_are_refused(x, out, message):
    with pytest.raises(NativeError, match=message):
        rms_norm(context(ISAS[-1]), torch.zeros(x), torch.ones(8), 1e-6, torch.zeros(out))
