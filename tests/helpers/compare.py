"""Comparing the result of an op with its reference, and guarding the memory around the result."""

from __future__ import annotations

import torch

EPSILON = 2.0**-24  # largest relative error of one rounding to float32


def sum_bound(magnitude: torch.Tensor, num_roundings: int) -> torch.Tensor:
    """Largest error of a float32 sum none of whose terms passes more than `num_roundings` roundings.

    `magnitude` is the sum of the terms' absolute values. Each rounding is relative, (1 + e)^n - 1 in
    all; the factor 1.01 covers the higher powers of e. The smallest normal float is added for terms
    that underflow.
    Source: Higham, "Accuracy and Stability of Numerical Algorithms", section 4.2.
    """
    return magnitude.double() * (num_roundings * EPSILON * 1.01) + torch.finfo(torch.float32).tiny


def _shapes(actual: torch.Tensor, expected: torch.Tensor) -> str:
    return f"shape: expected {tuple(expected.shape)}, got {tuple(actual.shape)}"


def assert_close(actual: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor) -> None:
    """Every element within its bound; NaN is far from everything, infinities must be equal."""
    assert actual.shape == expected.shape, _shapes(actual, expected)
    assert bound.shape == expected.shape, "bound: one for each element"
    actual, expected, bound = actual.double(), expected.double(), bound.double()
    is_close = ((actual - expected).abs() <= bound) | ((actual == expected) & expected.isinf())
    if is_close.all():
        return
    wrong = (~is_close).nonzero()
    first = tuple(wrong[0].tolist())
    raise AssertionError(
        f"{len(wrong)} of {actual.numel()} elements are wrong, the first at {first}: "
        f"expected {expected[first].item()!r} within {bound[first].item():.3g}, got {actual[first].item()!r}"
    )


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Bitwise equal float32: tells 0 from -0 and knows no tolerance."""
    assert actual.shape == expected.shape, _shapes(actual, expected)
    differs = actual.contiguous().view(torch.int32) != expected.contiguous().view(torch.int32)
    if differs.any():
        first = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(differs.sum())} of {actual.numel()} elements differ in their bits, the first at {first}: "
            f"expected {expected[first].item()!r}, got {actual[first].item()!r}"
        )


class GuardedOutput:
    """A float32 matrix filled with NaN inside a larger buffer, whose other elements must not change.

    `offset` shifts the start by that many elements, so that rows are not aligned; `gap` is the number
    of foreign elements between rows.
    """

    _GUARD = 1234.5

    def __init__(self, num_rows: int, num_columns: int, *, gap: int = 5, offset: int = 3) -> None:
        stride = num_columns + gap
        self._buffer = torch.full((offset + num_rows * stride + 64,), self._GUARD)
        self.tensor = self._buffer.as_strided((num_rows, num_columns), (stride, 1), offset)
        self.tensor.fill_(float("nan"))
        self._is_outside = torch.ones_like(self._buffer, dtype=torch.bool)
        self._is_outside.as_strided((num_rows, num_columns), (stride, 1), offset).fill_(False)

    def assert_untouched_outside(self) -> None:
        outside = self._buffer[self._is_outside]
        changed = int((outside != self._GUARD).sum())
        assert changed == 0, f"{changed} elements outside the output were written"
