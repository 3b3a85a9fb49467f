"""int8 and int4 weights against plain PyTorch on every instruction set, and promise P1 on them."""

from __future__ import annotations

import pytest
import torch

from engine import _native
from engine.errors import NativeError
from engine.ops import reference, reference_quantized
from engine.ops.linear import PackedMatrix, linear
from helpers.compare import GuardedOutput, assert_close, assert_same_bits, sum_bound
from helpers.native import FMA_ISAS, ISAS, context

FORMATS = [("int8", 128), ("int8", 32), ("int4", 32), ("int4", 128)]
CHAIN = 512  # k after which outliers are added


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_outliers(x: torch.Tensor) -> torch.Tensor:
    """A few elements of some rows far out of what the others are."""
    x = x.clone()
    for row, k in ((0, 0), (0, 130), (1, x.shape[1] - 1), (4, 5), (4, 6)):
        x[row % x.shape[0], k % x.shape[1]] = 90.0 if row % 2 else -70.0
    return x


def packed(weight: torch.Tensor, dtype: str, group_len: int = 0, *, balanced=False) -> PackedMatrix:
    ctx = context(ISAS[-1])
    matrix = PackedMatrix(*weight.shape, dtype, group_len)
    if balanced:
        matrix.balance_columns(ctx, [weight[:3], weight[3:]])
    matrix.pack_rows(ctx, 0, weight)
    return matrix


def product(ctx, x: torch.Tensor, matrix: PackedMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    out = torch.full((x.shape[0], matrix.out_features), float("nan"))
    linear(ctx, x, matrix, bias, out)
    return out


def check(isa, x, weight, bias, dtype, group_len, *, balanced=False) -> None:
    """Compares with the reference: inside the error bound, and nothing written outside of the output."""
    oracle = reference.PackedMatrix(*weight.shape, dtype, group_len)
    if balanced:
        oracle.balance_columns(None, [weight])
    oracle.pack_rows(None, 0, weight)
    expected = torch.empty(x.shape[0], weight.shape[0], dtype=torch.float64)
    reference.linear(None, x, oracle, bias, expected)
    rounded = reference_quantized.quantize_activations(x * oracle.column_scales)
    magnitude = rounded.double().abs() @ oracle.weight.double().abs().T
    if bias is not None:
        magnitude += bias.double().abs()
    # Of a term: both scales, the sum's conversion, its product and addition, those of the groups and
    # outliers that follow, the bias.
    num_terms = 5 + -(-x.shape[1] // 32) + 8 * -(-x.shape[1] // 128) + 1
    bound = sum_bound(magnitude, num_terms)
    out = GuardedOutput(*expected.shape)
    linear(context(isa), x, packed(weight, dtype, group_len, balanced=balanced), bias, out.tensor)
    assert_close(out.tensor, expected, bound)
    out.assert_untouched_outside()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dtype", "group_len"), FORMATS)
@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 5, 6, 7, 12, 13, 31, 96, 100])
def test_equals_reference_for_any_number_of_rows(isa, dtype, group_len, num_rows):
    x = with_outliers(normal(num_rows, 300)) if num_rows else normal(0, 300)
    check(isa, x, normal(70, 300, seed=1), normal(70, seed=2), dtype, group_len)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dtype", "group_len"), FORMATS)
@pytest.mark.parametrize("num_k", [1, 3, 4, 7, 8, 9, 31, 33, 64, 127, 129, CHAIN - 1, CHAIN, CHAIN + 1, 1500])
def test_equals_reference_for_any_shape(isa, dtype, group_len, num_k):
    for num_outputs in (1, 16, 33, 100):
        weight = normal(num_outputs, num_k, seed=1)
        check(isa, with_outliers(normal(5, num_k)), weight, normal(num_outputs, seed=2), dtype, group_len)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dtype", "group_len"), FORMATS)
def test_scaled_columns_equal_the_reference(isa, dtype, group_len):
    weight = normal(50, 700, seed=1)
    weight[:, [3, 77, 699]] *= 50
    check(isa, with_outliers(normal(9, 700)), weight, None, dtype, group_len, balanced=True)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dtype", "group_len"), FORMATS)
def test_inputs_may_be_strided_and_misaligned(isa, dtype, group_len):
    x, weight, bias = normal(9, 400)[:, 3:203], normal(40, 500, seed=1)[:, 7:207], normal(43, seed=2)[3:]
    check(isa, x, weight, bias, dtype, group_len)
    check(isa, x[::2], weight[::2].half(), None, dtype, group_len)


@pytest.mark.parametrize(("dtype", "group_len"), FORMATS)
@pytest.mark.parametrize(("num_outputs", "num_k"), [(100, 1000), (33, 77), (900, 300)])
def test_a_row_has_the_same_bits_in_any_batch_on_any_set_with_any_threads(
    dtype, group_len, num_outputs, num_k
):
    x, bias = normal(450, num_k), normal(num_outputs, seed=2)
    x[::7, num_k // 2] = 60
    matrix = packed(normal(num_outputs, num_k, seed=1), dtype, group_len)
    first = product(context(FMA_ISAS[0], 1), x, matrix, bias)
    for isa in FMA_ISAS:
        for num_threads in (1, 2, 3):
            assert_same_bits(product(context(isa, num_threads), x, matrix, bias), first)
        for num_rows in range(1, 40, 3):
            start = 7 * num_rows % 400
            rows = slice(start, start + num_rows)
            assert_same_bits(product(context(isa, 3), x[rows], matrix, bias), first[rows])


@pytest.mark.parametrize(("dtype", "group_len"), FORMATS)
def test_baseline_too_does_not_depend_on_batch_or_threads(dtype, group_len):
    x, matrix = with_outliers(normal(100, 300)), packed(normal(70, 300, seed=1), dtype, group_len)
    for isa in ISAS:
        whole = product(context(isa, 1), x, matrix)
        for row in (0, 1, 50, 99):
            assert_same_bits(product(context(isa, 3), x[row : row + 1], matrix), whole[row : row + 1])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dtype", "group_len"), FORMATS)
def test_every_code_of_weights_and_activations_is_multiplied_exactly(isa, dtype, group_len):
    """Whole numbers with scale 1 on both sides: products and sums are exact, the largest ones included."""
    most = 127 if dtype == "int8" else 7
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(-127, 128, (8, 384), generator=generator).float()
    x[:, ::128], x[6], x[7] = 127, 127, -127
    weight = torch.randint(-most, most + 1, (64, 384), generator=generator).float()
    weight[:, ::32] = 127 if dtype == "int8" else -8
    weight[62], weight[63] = (127, -127) if dtype == "int8" else (-8, 7)
    weight[63, ::32] = weight[62, ::32] if dtype == "int4" else -127
    out = product(context(isa), x, packed(weight, dtype, group_len))
    assert out.double().equal(x.double() @ weight.double().T)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dtype", "group_len"), FORMATS)
def test_zeros_tiny_and_huge_numbers(isa, dtype, group_len):
    x = torch.zeros(6, 256)
    x[1], x[2], x[3], x[4, 3] = 1e-38, 1e30, -1e-42, 1.0
    weight = normal(33, 256, seed=1)
    weight[0], weight[1], weight[2] = 0, 1e-30, 1e-44
    out = product(context(isa), x, packed(weight, dtype, group_len))
    assert out.isfinite().all()
    assert (out[0] == 0).all() and (out[:, 0] == 0).all()
    assert_close(out[4], unpacked(packed(weight, dtype, group_len))[:, 3], out[4].abs() * 1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dtype", "group_len"), FORMATS)
@pytest.mark.parametrize("num_rows", [1, 5, 60])
def test_nan_and_infinity_stay_in_their_row_and_column(isa, dtype, group_len, num_rows):
    x, weight = normal(num_rows, 300), normal(70, 300, seed=1)
    x[0, 7], weight[9, 3], weight[66, 299] = float("nan"), float("inf"), float("nan")
    if num_rows > 2:
        x[2, 299] = float("-inf")
    out = product(context(isa), x, packed(weight, dtype, group_len))
    is_finite = torch.ones(num_rows, 70, dtype=torch.bool)
    is_finite[0:3:2], is_finite[:, 9], is_finite[:, 66] = False, False, False
    assert out.isfinite().equal(is_finite)


# --- packing -----------------------------------------------------------------------------------


def unpacked(matrix: PackedMatrix, isa: str = ISAS[-1]) -> torch.Tensor:
    out = torch.full((matrix.out_features, matrix.in_features), float("nan"))
    ids = torch.arange(matrix.out_features, dtype=torch.int32)
    _native.embedding(context(isa), ids, matrix, out)
    return out


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dtype", "group_len"), FORMATS)
@pytest.mark.parametrize("balanced", [False, True])
def test_stores_the_numbers_of_the_reference(isa, dtype, group_len, balanced):
    weight = normal(100, 333)
    weight[:, 5] *= 60
    oracle = reference.PackedMatrix(100, 333, dtype, group_len)
    if balanced:
        oracle.balance_columns(None, [weight])
    oracle.pack_rows(None, 0, weight)
    expected = oracle.weight * oracle.column_scales
    assert unpacked(packed(weight, dtype, group_len, balanced=balanced), isa).equal(expected)


@pytest.mark.parametrize(("dtype", "group_len"), FORMATS)
def test_packs_parts_in_any_order(dtype, group_len):
    weight = normal(100, 130)
    matrix, ctx = PackedMatrix(100, 130, dtype, group_len), context(ISAS[-1], 3)
    for start, end in [(37, 70), (0, 5), (70, 100), (5, 37)]:
        assert not matrix.is_complete
        matrix.pack_rows(ctx, start, weight[start:end])
    assert matrix.is_complete
    assert unpacked(matrix).equal(unpacked(packed(weight, dtype, group_len)))


def test_column_scales_do_not_depend_on_threads_or_parts():
    weight = normal(500, 200)
    weight[:, ::9] *= torch.logspace(-1, 3, len(weight[0, ::9]))
    seen = []
    for num_threads, cuts in ((1, [500]), (3, [500]), (2, [1, 250, 500])):
        ctx, matrix, start = context(ISAS[-1], num_threads), PackedMatrix(500, 200, "int8"), 0
        matrix.balance_columns(ctx, [weight[a:b] for a, b in zip([0, *cuts], cuts, strict=False)])
        matrix.pack_rows(ctx, start, weight)
        seen.append(unpacked(matrix))
    assert seen[0].equal(seen[1]) and seen[0].equal(seen[2])


def test_properties():
    matrix = PackedMatrix(33, 130, "int8")
    assert (matrix.dtype, matrix.group_len) == ("int8", 128)
    assert matrix.num_bytes == 2 * (2 * 32 * 4 + 17 * 8 * 32)
    matrix = PackedMatrix(33, 130, "int4")
    assert (matrix.dtype, matrix.group_len) == ("int4", 32)
    assert matrix.num_bytes == 2 * (5 * 32 * 2 + 17 * 4 * 32)
    assert PackedMatrix(1, 1, "bfloat16").group_len == 0


def test_refuses_wrong_calls():
    ctx = context(ISAS[-1])
    with pytest.raises(NativeError, match="group_len: expected 32 or 128, got 64"):
        PackedMatrix(4, 8, "int8", 64)
    with pytest.raises(NativeError, match="only quantised weights have column scales"):
        PackedMatrix(4, 8, "bfloat16").balance_columns(ctx, [])
    matrix = PackedMatrix(4, 8, "int8")
    with pytest.raises(NativeError, match=r"weight: expected \[n, K=8\], got \[4, 9\]"):
        matrix.balance_columns(ctx, [torch.zeros(4, 9)])
    matrix.pack_rows(ctx, 0, torch.zeros(1, 8))
    with pytest.raises(NativeError, match="columns are balanced before rows are packed"):
        matrix.balance_columns(ctx, [torch.zeros(4, 8)])
    with pytest.raises(NativeError, match="weight: not all of its rows"):
        product(ctx, torch.zeros(1, 8), matrix)
