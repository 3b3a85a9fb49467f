"""The comparer that every kernel test relies on must itself see what goes wrong in kernels."""

from __future__ import annotations

import pytest
import torch

from helpers.compare import GuardedOutput, assert_close, assert_same_bits, sum_bound


@pytest.fixture
def expected():
    return torch.randn(7, 33, generator=torch.Generator().manual_seed(1)) * 10


def bound_of(expected: torch.Tensor) -> torch.Tensor:
    return sum_bound(expected.abs() * 4, 300)


def test_accepts_the_expected_values_and_errors_inside_the_bound(expected):
    bound = bound_of(expected)
    assert_close(expected.clone(), expected, bound)
    assert_close(expected.double() + 0.9 * bound, expected, bound)


@pytest.mark.parametrize(
    "wrong", ["nan", "inf", "sign", "next row", "next column", "one element", "unwritten"]
)
def test_reports(expected, wrong):
    actual = expected.clone()
    match wrong:
        case "nan":
            actual[3, 5] = float("nan")
        case "inf":
            actual[0, 0] = float("inf")
        case "sign":
            actual[6, 32] *= -1
        case "next row":
            actual = actual.roll(1, 0)
        case "next column":
            actual = actual.roll(1, 1)
        case "one element":
            actual[2, 2] += 1.1 * bound_of(expected)[2, 2]
        case "unwritten":
            actual[-1] = float("nan")
    with pytest.raises(AssertionError, match=r"wrong, the first at"):
        assert_close(actual, expected, bound_of(expected))


def test_names_the_first_wrong_element(expected):
    actual = expected.clone()
    actual[4, 1] = 1e6
    with pytest.raises(AssertionError, match=r"1 of 231 elements are wrong, the first at \(4, 1\).*1000000"):
        assert_close(actual, expected, bound_of(expected))


def test_nan_is_never_close_and_infinity_only_to_itself():
    def check(a: float, b: float):
        assert_close(torch.tensor([a]), torch.tensor([b]), torch.tensor([1.0]))

    inf, nan = float("inf"), float("nan")
    check(inf, inf)
    for a, b in [(nan, nan), (nan, 0.0), (0.0, nan), (inf, -inf), (inf, 3.4e38), (0.0, inf)]:
        with pytest.raises(AssertionError):
            check(a, b)


def test_shapes_must_agree(expected):
    with pytest.raises(AssertionError, match="shape"):
        assert_close(expected[:1], expected, bound_of(expected))
    with pytest.raises(AssertionError, match="shape"):
        assert_same_bits(expected[:, :1], expected)
    with pytest.raises(AssertionError, match="bound"):
        assert_close(expected, expected, bound_of(expected)[:1])


def test_same_bits_sees_the_last_bit_and_the_sign_of_zero():
    assert_same_bits(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")]))
    with pytest.raises(AssertionError, match="differ in their bits"):
        assert_same_bits(torch.tensor([1.0]), torch.tensor([1.0 + 2**-23]))
    with pytest.raises(AssertionError, match="differ in their bits"):
        assert_same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))


@pytest.mark.parametrize("place", [(0, -1), (0, 4), (2, 4), (-1, 0)])
def test_guard_sees_writes_around_the_output(place):
    out = GuardedOutput(3, 4)
    out.tensor.fill_(0)
    out.assert_untouched_outside()
    row, column = place
    stride = out.tensor.stride(0)
    buffer = torch.as_strided(out.tensor, (out.tensor.untyped_storage().nbytes() // 4,), (1,), 0)
    buffer[out.tensor.storage_offset() + row * stride + column] = 0
    with pytest.raises(AssertionError, match="1 elements outside"):
        out.assert_untouched_outside()


def test_sum_bound_holds_for_sums_in_float32():
    terms = torch.randn(100, 1000, generator=torch.Generator().manual_seed(2))
    sums = torch.zeros(100)
    for column in terms.T:
        sums += column
    assert_close(sums, terms.double().sum(1), sum_bound(terms.abs().sum(1), 1000))
