"""ops.linear against plain PyTorch on every instruction set, and promise P1 on it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
import torch

from engine import _native
from engine.errors import NativeError
from engine.ops import reference
from engine.ops.linear import PackedMatrix, linear
from helpers.compare import GuardedOutput, assert_close, assert_same_bits, sum_bound
from helpers.native import FMA_ISAS, ISAS, context

DTYPES = ["bfloat16", "float32"]
ROWS = [0, 1, 2, 3, 5, 8, 12, 13, 16, 17, 31, 64, 100]
CHAIN = 256  # products added in one chain before the chains are added; decision 0001


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(weight: torch.Tensor, dtype: str) -> PackedMatrix:
    matrix = PackedMatrix(*weight.shape, dtype)
    matrix.pack_rows(context(ISAS[-1]), 0, weight)
    return matrix


def product(ctx, x: torch.Tensor, matrix: PackedMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    out = torch.full((x.shape[0], matrix.out_features), float("nan"))
    linear(ctx, x, matrix, bias, out)
    return out


def check(isa: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: str) -> None:
    """Compares with the reference: inside the error bound, and nothing written outside of the output."""
    expected_weight = reference.PackedMatrix(*weight.shape, dtype)
    expected_weight.pack_rows(None, 0, weight)
    expected = torch.empty(x.shape[0], weight.shape[0], dtype=torch.float64)
    reference.linear(None, x, expected_weight, bias, expected)
    magnitude = x.double().abs() @ expected_weight.weight.double().abs().T
    if bias is not None:
        magnitude += bias.double().abs()
    num_k = x.shape[1]
    # A product and its sums within the chain, one sum for each chain, one for the bias.
    bound = sum_bound(magnitude, 1 + min(num_k, CHAIN) + -(-num_k // CHAIN) + 1)

    out = GuardedOutput(*expected.shape)
    linear(context(isa), x, packed(weight, dtype), bias, out.tensor)
    assert_close(out.tensor, expected, bound)
    out.assert_untouched_outside()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", ROWS)
def test_equals_reference_for_any_number_of_rows(isa, dtype, num_rows):
    check(isa, normal(num_rows, 300), normal(70, 300, seed=1), normal(70, seed=2), dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_outputs", [1, 15, 16, 31, 32, 33, 100])
@pytest.mark.parametrize("num_k", [1, 7, 16, 64, 200, 1000])
def test_equals_reference_for_any_shape(isa, dtype, num_outputs, num_k):
    weight, bias = normal(num_outputs, num_k, seed=1), normal(num_outputs, seed=2)
    for num_rows in (1, 5, 40):
        check(isa, normal(num_rows, num_k), weight, bias, dtype)
    check(isa, normal(3, num_k), weight, None, dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("num_k", [CHAIN - 1, CHAIN, CHAIN + 1, 2 * CHAIN, 2 * CHAIN + 1])
def test_equals_reference_around_the_length_of_a_chain(isa, num_k):
    for dtype in DTYPES:
        check(isa, normal(4, num_k), normal(33, num_k, seed=1), normal(33, seed=2), dtype)


@pytest.mark.parametrize("isa", ISAS)
def test_inputs_may_be_strided_and_misaligned(isa):
    wide = normal(9, 400)
    check(isa, wide[:, 3:203], normal(40, 500, seed=1)[:, 7:207], normal(43, seed=2)[3:], "bfloat16")
    check(isa, wide[::2, 1:33], normal(80, 32, seed=1)[::2], None, "float32")
    check(isa, wide[:1].expand(14, 400), normal(40, 400, seed=1), None, "bfloat16")


@pytest.mark.parametrize("isa", ISAS)
def test_takes_other_arrays_than_torch(isa):
    x, weight, bias = np.eye(3, 8, dtype=np.float32), np.arange(32, dtype=np.float32).reshape(4, 8), None
    matrix = PackedMatrix(4, 8, "float32")
    matrix.pack_rows(context(isa), 0, weight)
    out = np.full((3, 4), np.nan, np.float32)
    linear(context(isa), x, matrix, bias, out)
    assert (out == weight.T[:3]).all()
    linear(context(isa), x, matrix, np.ones(4, np.float32), out)
    assert (out == weight.T[:3] + 1).all()


def in_decided_order(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Decision 0001 word for word. A float64 holds the exact product of two float32 with few bits each,
    so that rounding the float64 sum once is a fused multiplication and addition."""
    total = None
    for start in range(0, x.shape[1], CHAIN):
        chain = np.zeros((x.shape[0], weight.shape[0]), np.float32)
        for k in range(start, min(start + CHAIN, x.shape[1])):
            chain = (chain + np.outer(x[:, k], weight[:, k]).astype(np.float64)).astype(np.float32)
        total = chain if total is None else total + chain
    return total + bias


@pytest.mark.parametrize("isa", FMA_ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_order_of_sums_is_the_decided_one(isa, dtype):
    pair = normal(3, 700), normal(33, 700, seed=1)
    # 8 significant bits in both factors and exponents in a narrow range: the float64 sum is exact.
    x, weight = (factors.sign() * factors.abs().clamp(2**-7, 4).bfloat16() for factors in pair)
    bias = normal(33, seed=2)
    expected = in_decided_order(x.double().numpy(), weight.double().numpy(), bias.numpy())
    assert_same_bits(product(context(isa), x, packed(weight, dtype), bias), torch.from_numpy(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_outputs", "num_k"), [(100, 1000), (33, 77), (900, 300)])
def test_a_row_has_the_same_bits_in_any_batch_on_any_set_with_any_threads(dtype, num_outputs, num_k):
    x, bias = normal(450, num_k), normal(num_outputs, seed=2)
    matrix = packed(normal(num_outputs, num_k, seed=1), dtype)
    first = product(context(FMA_ISAS[0], 1), x, matrix, bias)
    for isa in FMA_ISAS:
        for num_threads in (1, 2, 3):
            ctx = context(isa, num_threads)
            assert_same_bits(product(ctx, x, matrix, bias), first)
        ctx = context(isa, 3)
        for num_rows in range(1, 40):
            start = 7 * num_rows % 400
            assert_same_bits(
                product(ctx, x[start : start + num_rows], matrix, bias), first[start : start + num_rows]
            )


@pytest.mark.parametrize("isa", ISAS)
def test_baseline_too_does_not_depend_on_batch_or_threads(isa):
    x, matrix = normal(100, 300), packed(normal(70, 300, seed=1), "bfloat16")
    whole = product(context(isa, 1), x, matrix)
    assert_same_bits(product(context(isa, 3), x, matrix), whole)
    for row in (0, 1, 50, 99):
        assert_same_bits(product(context(isa, 3), x[row : row + 1], matrix), whole[row : row + 1])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("num_rows", [1, 5, 60])
def test_nan_and_infinity_stay_in_their_row_and_column(isa, num_rows):
    x, weight = normal(num_rows, 300), normal(70, 300, seed=1)
    x[0, 7], weight[9, 3], weight[66, 299] = float("nan"), float("inf"), float("nan")
    out = product(context(isa), x, packed(weight, "bfloat16"))
    is_finite = torch.ones(num_rows, 70, dtype=torch.bool)
    is_finite[0], is_finite[:, 9], is_finite[:, 66] = False, False, False
    assert out.isfinite().equal(is_finite)
    assert out[1:, 9].isinf().all()


@pytest.mark.parametrize("isa", ISAS)
def test_python_threads_may_share_a_context(isa):
    """Products that take long enough for the regions of several callers to meet."""
    ctx, matrix = context(isa, 3), packed(normal(1024, 512, seed=1), "bfloat16")
    inputs = [normal(num_rows, 512, seed=num_rows) for num_rows in (1, 63, 64)]
    expected = [product(ctx, x, matrix) for x in inputs]
    failures = []

    def work(i: int) -> None:
        try:
            for _ in range(20):
                assert_same_bits(product(ctx, inputs[i], matrix), expected[i])
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# --- packing -----------------------------------------------------------------------------------


def unpacked(matrix: PackedMatrix) -> torch.Tensor:
    out = torch.full((matrix.out_features, matrix.in_features), float("nan"))
    ids = torch.arange(matrix.out_features, dtype=torch.int32)
    _native.embedding(context(ISAS[-1]), ids, matrix, out)
    return out


def test_packs_parts_in_any_order_and_knows_when_it_is_complete():
    weight = normal(100, 130)
    matrix, ctx = PackedMatrix(100, 130, "float32"), context(ISAS[-1])
    parts = [(37, 70), (0, 5), (70, 100), (5, 37)]
    for start, end in parts:
        assert not matrix.is_complete
        with pytest.raises(NativeError, match="weight: not all of its rows"):
            product(ctx, normal(2, 130), matrix)
        matrix.pack_rows(ctx, start, weight[start:end])
        matrix.pack_rows(ctx, start, weight[start:end])
    assert matrix.is_complete
    assert unpacked(matrix).equal(weight)
    matrix.pack_rows(ctx, 31, -weight[31:34])
    weight[31:34] *= -1
    assert unpacked(matrix).equal(weight)


def test_packs_different_rows_of_the_same_panels_from_two_threads():
    weight = normal(400, 333)
    matrix = PackedMatrix(400, 333, "bfloat16")
    starts = range(0, 400, 5)

    def work(first: int) -> None:
        ctx = _native.ExecutionContext(1)
        for start in starts[first::2]:
            matrix.pack_rows(ctx, start, weight[start : start + 5])

    with ThreadPoolExecutor(2) as executor:
        list(executor.map(work, (0, 1)))
    assert matrix.is_complete
    assert unpacked(matrix).equal(weight.bfloat16().float())


def test_a_matrix_of_huge_pages_is_packed_and_read_like_a_small_one():
    check(ISAS[-1], normal(2, 1100), normal(1300, 1100, seed=1), None, "bfloat16")
    check(ISAS[-1], normal(20, 1100), normal(1300, 1100, seed=1), None, "float32")


def test_memory_is_given_back():
    process = psutil.Process()
    weight = torch.ones(1, 1024).expand(16384, 1024)
    packed(weight, "bfloat16")
    before = process.memory_info().rss
    for _ in range(6):
        packed(weight, "bfloat16")
    assert process.memory_info().rss - before < 2 * 16384 * 1024 * 2


def test_properties():
    matrix = PackedMatrix(33, 10, "bfloat16")
    assert (matrix.out_features, matrix.in_features, matrix.dtype) == (33, 10, "bfloat16")
    assert matrix.num_bytes == 64 * 10 * 2
    assert PackedMatrix(1, 1, "float32").num_bytes == 32 * 4


def all_bfloat16() -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def all_float16() -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)


def rounding_cases() -> torch.Tensor:
    """Around every bfloat16: itself, halfway to the next one, and the floats beside both."""
    upper = torch.arange(0, 2**16, dtype=torch.int64)[:, None] << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (upper | lower).flatten()
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [all_bfloat16, all_float16, rounding_cases])
def test_converts_every_value_as_torch_does(make, dtype):
    weight = make().reshape(-1, 64)
    stored = unpacked(packed(weight, dtype))
    expected = weight.to(getattr(torch, dtype)).float()
    assert stored.isnan().equal(expected.isnan())
    assert_same_bits(stored.nan_to_num(nan=0.5), expected.nan_to_num(nan=0.5))


def test_accepts_no_rows():
    matrix = PackedMatrix(4, 8, "float32")
    matrix.pack_rows(context(ISAS[-1]), 4, torch.empty(0, 8))
    assert not matrix.is_complete


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 8, "float32"), "out_features: expected 1 to"),
        ((8, -1, "float32"), "in_features: expected 1 to"),
        ((2**40, 8, "float32"), "out_features: expected 1 to"),
        ((8, 8, "float64"), "dtype: expected float32, bfloat16, bf16_dot, int8, .* got 'float64'"),
        ((2**24, 2**24, "float32"), "memory: the system refused 1125899906842624 bytes"),
    ],
)
def test_refuses_impossible_matrices(arguments, message):
    with pytest.raises(NativeError, match=message):
        PackedMatrix(*arguments)


@pytest.mark.parametrize(
    ("row_start", "weight", "message"),
    [
        (0, torch.zeros(2, 9), r"weight: expected \[n, K=8\], got \[2, 9\]"),
        (
            0,
            torch.zeros(2, 8, dtype=torch.int32),
            "weight: expected float32 or bfloat16 .*got int32",
        ),
        (0, torch.zeros(16), r"weight: expected \[n, K=8\]"),
        (0, torch.zeros(8, 2).T, "weight: expected contiguous rows"),
        (3, torch.zeros(2, 8), "row_start: 2 rows from 3 on, but the matrix has 4"),
        (-1, torch.zeros(2, 8), "row_start: 2 rows from -1 on"),
        (0, torch.zeros(5, 8), "row_start: 5 rows from 0 on"),
        (2**62, torch.zeros(1, 8), "row_start"),
    ],
)
def test_refuses_wrong_rows(row_start, weight, message):
    matrix = PackedMatrix(4, 8, "float32")
    with pytest.raises(NativeError, match=message):
        matrix.pack_rows(context(ISAS[-1]), row_start, weight)
    assert not matrix.is_complete


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(3, 9)}, r"x: expected \[T, K=8\], got \[3, 9\]"),
        ({"x": torch.zeros(8)}, r"x: expected \[T, K=8\], got \[8\]"),
        ({"x": torch.zeros(3, 8).bfloat16()}, "x: expected float32, got bfloat16"),
        ({"x": torch.zeros(8, 3).T}, "x: expected contiguous rows"),
        ({"bias": torch.zeros(5)}, r"bias: expected \[N=4\], got \[5\]"),
        ({"bias": torch.zeros(4).double()}, "bias: expected float32, got float64"),
        ({"bias": torch.zeros(8)[::2]}, "bias: expected a contiguous tensor"),
        ({"out": torch.zeros(2, 4)}, r"out: expected \[T=3, N=4\], got \[2, 4\]"),
        ({"out": torch.zeros(3, 5)}, r"out: expected \[T=3, N=4\], got \[3, 5\]"),
        ({"out": torch.zeros(4, 3).T}, "out: expected contiguous rows"),
        ({"weight": PackedMatrix(4, 8, "float32")}, "weight: not all of its rows"),
    ],
)
def test_refuses_wrong_arguments(changed, message):
    arguments = {
        "x": torch.zeros(3, 8),
        "weight": packed(torch.zeros(4, 8), "float32"),
        "bias": torch.zeros(4),
        "out": torch.zeros(3, 4),
    }
    with pytest.raises(NativeError, match=message):
        linear(context(ISAS[-1]), **(arguments | changed))
