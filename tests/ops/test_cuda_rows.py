"""Norms, gates, soft caps and lookups of the CUDA backend, run by the emulator, against their references."""

from __future__ import annotations

import types

import pytest
import torch

from engine.errors import NativeError
from engine.ops import reference
from engine.ops.cuda import gated, lookup, norm
from helpers.compare import assert_close, assert_same_bits, sum_bound
from helpers.cuda_host import emulated_ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GUARD = 77.0


@pytest.fixture(autouse=True, params=[False, True], ids=["forwards", "backwards"])
def ops(request):
    with emulated_ops() as module:
        module.run_backwards(request.param)
        yield
        module.run_backwards(False)


class Rows:
    """A matrix of NaN inside a larger buffer that must not change.

    Rows are `gap` apart from one another, the first at element `offset`.
    """

    def __init__(self, dtype: torch.dtype, num_rows: int, n: int, gap: int, offset: int) -> None:
        self._buffer = torch.full((offset + num_rows * (n + gap) + 16,), GUARD, dtype=dtype)
        self.tensor = self._buffer.as_strided((num_rows, n), (n + gap, 1), offset)
        self.tensor.fill_(float("nan"))

    def holding(self, values: torch.Tensor) -> torch.Tensor:
        self.tensor.copy_(values)
        return self.tensor

    def assert_untouched_outside(self) -> None:
        kept = self.tensor.clone()
        self.tensor.fill_(GUARD)
        assert (self._buffer == GUARD).all(), "elements outside the rows were written"
        self.tensor.copy_(kept)


LAYOUTS = [(8, 8), (0, 0), (3, 5)]
"""Gap and offset: rows at multiples of 16 bytes, with and without gaps, and rows that start anywhere."""


def rounding(expected: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half a unit in the last place of a result, and for float16 of its smallest numbers."""
    info = torch.finfo(dtype)
    return expected.double().abs() * (info.eps / 2) * 1.01 + info.smallest_normal * info.eps


def norm_bound(expected: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sum of n squares under the root counts half; the root, two products, the mean and eps."""
    own = sum_bound(expected.abs(), expected.shape[-1] // 2 + 8)
    return own if dtype == torch.float32 else own + rounding(expected, dtype)


@pytest.mark.parametrize(("gap", "offset"), LAYOUTS)
@pytest.mark.parametrize("n", [1, 16, 100, 128, 896, 9000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_are_the_reference(dtype, n, gap, offset):
    torch.manual_seed(n)
    weight = torch.randn(n)
    x = Rows(dtype, 5, n, gap, offset).holding(torch.randn(5, n) * 3)
    update, out = torch.randn(5, n).to(dtype), Rows(dtype, 5, n, gap, offset)
    expected = torch.empty(5, n, dtype=torch.float64)
    norm.rms_norm(None, x, weight, 1e-5, out.tensor)
    reference.rms_norm(None, x, weight, 1e-5, expected)
    assert_close(out.tensor, expected, norm_bound(expected, dtype))
    out.assert_untouched_outside()

    total = x + update
    norm.add_rms_norm(None, update, x, weight, 1e-5, out.tensor)
    reference.rms_norm(None, total, weight, 1e-5, expected)
    assert torch.equal(x, total), "the sum is rounded to the dtype of the residual stream, as torch's is"
    assert_close(out.tensor, expected, norm_bound(expected, dtype))
    out.assert_untouched_outside()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 24, 300])
def test_heads_of_strided_rows_in_place(dtype, head_dim):
    """As query and key norms use it: on some columns of a wider matrix."""
    torch.manual_seed(0)
    rows = torch.randn(6, 1000).to(dtype)
    kept, weight = rows.clone(), torch.randn(head_dim)
    heads = rows[:, 48 : 48 + 3 * head_dim].unflatten(1, (3, head_dim))
    expected = torch.empty(6, 3, head_dim, dtype=torch.float64)
    reference.rms_norm(None, heads, weight, 1e-6, expected)
    norm.rms_norm(None, heads, weight, 1e-6, heads)
    assert_close(heads, expected, norm_bound(expected, dtype))
    assert torch.equal(rows[:, :48], kept[:, :48])
    assert torch.equal(rows[:, 48 + 3 * head_dim :], kept[:, 48 + 3 * head_dim :])


def test_rows_do_not_depend_on_their_batch_and_keep_their_nan():
    torch.manual_seed(1)
    x, weight = torch.randn(7, 336), torch.randn(336)
    x[3, 7] = float("nan")
    whole = torch.empty_like(x)
    norm.rms_norm(None, x, weight, 1e-6, whole)
    for row in range(7):
        alone = torch.empty(1, 336)
        norm.rms_norm(None, x[row : row + 1], weight, 1e-6, alone)
        assert_same_bits(alone, whole[row : row + 1])
    assert whole.isnan().any(1).tolist() == [row == 3 for row in range(7)]


GATES = {
    "silu": (gated.silu_mul, reference.silu_mul),
    "gelu_tanh": (gated.gelu_mul, reference.gelu_mul),
    "gelu": (gated.erf_gelu_mul, reference.erf_gelu_mul),
    "clamped": (
        lambda ctx, x, out: gated.clamped_swiglu(ctx, x, 1.702, 7.0, out),
        lambda ctx, x, out: reference.clamped_swiglu(ctx, x, 1.702, 7.0, out),
    ),
}


@pytest.mark.parametrize(("gap", "offset"), LAYOUTS)
@pytest.mark.parametrize("n", [1, 100, 1032])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", GATES)
def test_gates_are_the_reference(gate, dtype, n, gap, offset):
    native, plain = GATES[gate]
    torch.manual_seed(n)
    values = torch.randn(3, 2 * n) * 4
    values[:, : min(n, 8)] = torch.tensor([0.0, -0.0, 30, -30, 88, -88, 1e3, -1e3])[: min(n, 8)]
    gate_up = Rows(dtype, 3, 2 * n, gap, offset).holding(values)
    out, expected = Rows(dtype, 3, n, gap, offset), torch.empty(3, n, dtype=torch.float64)
    native(None, gate_up, out.tensor)
    plain(None, gate_up, expected)
    # exp(-x) of the sigmoid is relative, with an argument rounded four times: |x| of those come on top. The
    # reference adds 1 to what may be near -1.
    first, second = (half.double().abs() for half in gate_up.chunk(2, -1))
    bound = sum_bound(expected.abs() * (1 + first * first), 16) + first * second * 2.0**-52
    bound = bound if dtype == torch.float32 else bound + rounding(expected, dtype)
    assert_close(out.tensor, expected, bound)
    out.assert_untouched_outside()


@pytest.mark.parametrize("gate", GATES)
def test_what_is_no_number_shows(gate):
    gate_up = torch.zeros(2, 16)
    gate_up[0, 3] = gate_up[1, 12] = float("nan")
    out = torch.zeros(2, 8)
    GATES[gate][0](None, gate_up, out)
    assert out.isnan().nonzero().tolist() == [[0, 3], [1, 4]]


@pytest.mark.parametrize(("gap", "offset"), LAYOUTS)
@pytest.mark.parametrize("n", [1, 100, 1030])
def test_softcap_is_the_reference(n, gap, offset):
    torch.manual_seed(n)
    values = torch.randn(3, n) * 40
    values[0, 0], values[1, 0], values[2, 0] = float("inf"), -float("inf"), float("nan")
    rows, expected = Rows(torch.float32, 3, n, gap, offset), values.double()
    x = rows.holding(values)
    reference.softcap(None, expected, 30.0)
    gated.softcap(None, x, 30.0)
    assert x[2, 0].isnan()
    x[2, 0], expected[2, 0] = 0, 0
    # Before the tanh three roundings of the argument, whose slope is at most 1.
    assert_close(x, expected, sum_bound(expected.abs(), 8))
    rows.assert_untouched_outside()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "gap", "offset"), [(64, 8, 8), (2048, 0, 0), (30, 3, 5), (1, 0, 0)])
def test_embedding_copies_rows_and_zeros_what_is_no_token(dtype, width, gap, offset):
    weight = Rows(dtype, 50, width, gap, offset).holding(torch.randn(50, width))
    token_ids = torch.tensor([0, 49, -1, 7, 50, 7, 2**31 - 1, -(2**31)], dtype=torch.int32)
    out = Rows(dtype, 8, width, gap, offset)
    lookup.embedding(None, token_ids, types.SimpleNamespace(weight=weight, is_coded=False), out.tensor)
    for row, token in zip(out.tensor, token_ids.tolist(), strict=True):
        assert torch.equal(row, weight[token] if 0 <= token < 50 else torch.zeros(width, dtype=dtype))
    out.assert_untouched_outside()


def test_no_rows():
    empty, weight = torch.zeros(0, 8), torch.ones(8)
    norm.rms_norm(None, empty, weight, 1e-6, empty)
    norm.add_rms_norm(None, empty, empty, weight, 1e-6, empty)
    gated.silu_mul(None, torch.zeros(0, 16), empty)
    gated.softcap(None, empty, 3.0)
    ids = torch.zeros(0, dtype=torch.int32)
    lookup.embedding(None, ids, types.SimpleNamespace(weight=torch.zeros(4, 8), is_coded=False), empty)


X, W, OUT = torch.zeros(2, 8), torch.ones(8), torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: norm.rms_norm(None, X, W.half(), 1e-6, OUT), "weight: expected float32, got float16"),
        (lambda: norm.rms_norm(None, X, W, 1e-6, OUT.half()), "out: expected float32, got float16"),
        (lambda: norm.rms_norm(None, X, W[:7], 1e-6, OUT), r"weight: expected \[n=8\], got \[7\]"),
        (lambda: norm.rms_norm(None, X.T, W, 1e-6, OUT), "x: expected"),
        (lambda: norm.add_rms_norm(None, X, X.bfloat16(), W, 1e-6, OUT), "residual: expected float32"),
        (lambda: gated.silu_mul(None, torch.zeros(2, 15), OUT), r"gate_up: expected \[T=2, 16\]"),
        (lambda: gated.silu_mul(None, torch.zeros(2, 16).half(), OUT), "gate_up: expected float32"),
        (
            lambda: gated.clamped_swiglu(None, torch.zeros(2, 16), 1.0, -1.0, OUT),
            "limit: expected a positive",
        ),
        (lambda: gated.softcap(None, X, 0.0), "cap: expected a positive number"),
        (lambda: gated.softcap(None, X.half(), 3.0), "x: expected float32, got float16"),
        (
            lambda: lookup.embedding(
                None, torch.zeros(2), types.SimpleNamespace(weight=X, is_coded=False), OUT
            ),
            "token_ids: expected int32",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(NativeError, match=message):
        call()
