"""Weights that come quantised: packed exactly, and multiplied as plain PyTorch does on every set."""

from __future__ import annotations

import pytest
import torch

from engine import _native
from engine.errors import NativeError
from engine.ops import reference, reference_quantized
from engine.ops.linear import PackedMatrix, linear
from helpers.compare import GuardedOutput, assert_close, assert_same_bits, sum_bound
from helpers.native import FMA_ISAS, ISAS, context

FORMATS = [(dtype, group_len) for dtype in ("int8", "int4", "int4_affine") for group_len in (32, 128)]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(num_rows: int, num_k: int) -> torch.Tensor:
    x = normal(num_rows, num_k, seed=3)
    x[::3, num_k // 2] = 70.0  # an outlier, which takes another path
    return x


def coded(dtype: str, group_len: int, num_outputs: int, num_k: int, seed: int = 0):
    """Every code, with scales of both signs, and of affine weights offsets: (codes, scales, offsets)."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(256 if dtype == "int8" else 16, (num_outputs, num_k), generator=generator)
    shape = num_outputs, -(-num_k // group_len)
    scales = torch.randn(shape, generator=generator) * 0.1
    offsets = torch.randn(shape, generator=generator) if dtype == "int4_affine" else None
    return codes.to(torch.uint8), scales.half() if dtype == "int4" else scales, offsets


def packed(cls, dtype: str, group_len: int, parts, order: torch.Tensor | None = None):
    matrix = cls(*parts[0].shape, dtype, group_len)
    matrix.pack_codes(context(ISAS[-1]), 0, *parts)
    if order is not None:
        matrix.column_order = order.tolist()
    return matrix


def product(ctx, x: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
    out = torch.full((x.shape[0], matrix.out_features), float("nan"))
    linear(ctx, x, matrix, None, out)
    return out


def unpacked(matrix: PackedMatrix, isa: str) -> torch.Tensor:
    out = torch.full((matrix.out_features, matrix.in_features), float("nan"))
    _native.embedding(context(isa), torch.arange(matrix.out_features, dtype=torch.int32), matrix, out)
    return out


def shuffled(num_k: int) -> torch.Tensor:
    return torch.randperm(num_k, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dtype", "group_len"), FORMATS)
@pytest.mark.parametrize("num_k", [1, 7, 32, 100, 128, 513])
@pytest.mark.parametrize("is_ordered", [False, True])
def test_stores_the_given_numbers_exactly(isa, dtype, group_len, num_k, is_ordered):
    parts = coded(dtype, group_len, 67, num_k)
    order = shuffled(num_k) if is_ordered else None
    expected = reference_quantized.dequantize(*parts, dtype, group_len)
    if is_ordered:
        expected = torch.empty_like(expected).index_copy_(1, order, expected)
    assert unpacked(packed(PackedMatrix, dtype, group_len, parts, order), isa).equal(expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dtype", "group_len"), FORMATS)
@pytest.mark.parametrize("is_ordered", [False, True])
@pytest.mark.parametrize(
    ("num_rows", "num_outputs", "num_k"),
    [(0, 5, 40), (1, 33, 3), (2, 70, 129), (5, 16, 511), (7, 100, 300), (13, 40, 1500), (100, 70, 256)],
)
def test_products_equal_the_reference(isa, dtype, group_len, is_ordered, num_rows, num_outputs, num_k):
    parts = coded(dtype, group_len, num_outputs, num_k)
    order = shuffled(num_k) if is_ordered else None
    x = inputs(num_rows, num_k)
    oracle = packed(reference.PackedMatrix, dtype, group_len, parts, order)
    expected = torch.empty(num_rows, num_outputs, dtype=torch.float64)
    reference.linear(None, x, oracle, None, expected)
    rounded = reference_quantized.quantize_activations(x if order is None else x[:, order])
    codes, scales, offsets = parts
    if offsets is None:
        sizes = oracle.weight.abs()
    else:  # scale * code and offset are added apart, and may cancel
        sizes = reference_quantized.dequantize(codes, scales.abs(), offsets.abs(), dtype, group_len)
    magnitude = rounded.double().abs() @ sizes.double().T
    # Of a term: both scales, the sum's conversion, its product, twice the groups that follow, the outliers.
    bound = sum_bound(magnitude, 6 + 2 * -(-num_k // 32) + 8 * -(-num_k // 128))
    out = GuardedOutput(num_rows, num_outputs)
    linear(context(isa), x, packed(PackedMatrix, dtype, group_len, parts, order), None, out.tensor)
    assert_close(out.tensor, expected, bound)
    out.assert_untouched_outside()


@pytest.mark.parametrize(("dtype", "group_len"), FORMATS)
@pytest.mark.parametrize("is_ordered", [False, True])
def test_a_row_has_the_same_bits_in_any_batch_on_any_set_with_any_threads(dtype, group_len, is_ordered):
    order = shuffled(700) if is_ordered else None
    matrix = packed(PackedMatrix, dtype, group_len, coded(dtype, group_len, 150, 700), order)
    x = inputs(130, 700)
    first = product(context(FMA_ISAS[0], 1), x, matrix)
    for isa in FMA_ISAS:
        for num_threads in (1, 3):
            assert_same_bits(product(context(isa, num_threads), x, matrix), first)
        for num_rows in range(1, 30, 3):
            rows = slice(3 * num_rows, 4 * num_rows)
            assert_same_bits(product(context(isa, 3), x[rows], matrix), first[rows])
    plain = product(context(ISAS[0], 1), x, matrix)  # without fma: other bits, the same promise
    assert_same_bits(product(context(ISAS[0], 3), x[50:51], matrix), plain[50:51])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("group_len", [32, 128])
def test_zero_points_are_exact_for_whole_numbers(isa, group_len):
    """(code - zero) * scale with a zero point and a power of two for each group: no rounding anywhere."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(16, (64, 512), generator=generator).to(torch.uint8)
    zeros = torch.randint(17, (64, 512 // group_len), generator=generator).float()
    scales = torch.randint(-2, 3, zeros.shape, generator=generator).float().exp2()
    x = torch.randint(-127, 128, (9, 512), generator=generator).float()
    x[:, ::128] = 127
    matrix = packed(PackedMatrix, "int4_affine", group_len, (codes, scales, -zeros * scales))
    groups = codes.double().unflatten(1, (-1, group_len))
    weight = ((groups - zeros[..., None].double()) * scales[..., None].double()).flatten(1)
    assert unpacked(matrix, isa).double().equal(weight)
    assert product(context(isa), x, matrix).double().equal(x.double() @ weight.T)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dtype", "group_len"), FORMATS)
def test_nan_stays_in_its_row_and_column(isa, dtype, group_len):
    codes, scales, offsets = coded(dtype, group_len, 70, 300)
    scales[9, 1] = float("nan")
    x = inputs(6, 300)
    x[2, 299] = float("inf")
    out = product(context(isa), x, packed(PackedMatrix, dtype, group_len, (codes, scales, offsets)))
    is_finite = torch.ones(6, 70, dtype=torch.bool)
    is_finite[2], is_finite[:, 9] = False, False
    assert out.isfinite().equal(is_finite)


@pytest.mark.parametrize(("dtype", "group_len"), FORMATS)
def test_parts_may_come_in_any_order_and_strided(dtype, group_len):
    parts = coded(dtype, group_len, 100, 130)
    matrix, ctx = PackedMatrix(100, 130, dtype, group_len), context(ISAS[-1], 3)
    for start, end in [(37, 70), (0, 5), (70, 100), (5, 37)]:
        assert not matrix.is_complete
        wide = [None if part is None else part[start:end].repeat(1, 2) for part in parts]
        views = [None if w is None else w[:, : w.shape[1] // 2] for w in wide]
        matrix.pack_codes(ctx, start, *views)
    assert matrix.is_complete
    expected = reference_quantized.dequantize(*parts, dtype, group_len)
    assert unpacked(matrix, ISAS[-1]).equal(expected)


def test_a_file_keeps_them(tmp_path):
    parts = coded("int4_affine", 32, 40, 96)
    matrix, again = packed(PackedMatrix, "int4_affine", 32, parts), PackedMatrix(40, 96, "int4_affine", 32)
    assert matrix.num_bytes == 2 * (3 * 32 * 8 + 96 // 2 * 32)
    ctx = context(ISAS[-1])
    with (tmp_path / "file").open("w+b") as file:
        matrix.write_file(ctx, file.fileno(), 0)
        again.read_file(ctx, file.fileno(), 0)
    assert unpacked(again, ISAS[-1]).equal(unpacked(matrix, ISAS[-1]))


def test_refuses_wrong_calls():
    ctx = context(ISAS[-1])
    codes, scales, offsets = coded("int4_affine", 32, 4, 64)
    with pytest.raises(NativeError, match="only quantised weights have codes"):
        PackedMatrix(4, 64, "bfloat16").pack_codes(ctx, 0, codes, scales)
    with pytest.raises(NativeError, match="packed from their codes"):
        PackedMatrix(4, 64, "int4_affine").pack_rows(ctx, 0, torch.zeros(4, 64))
    matrix = PackedMatrix(4, 64, "int4_affine")
    with pytest.raises(NativeError, match="offsets: int4_affine weights have them"):
        matrix.pack_codes(ctx, 0, codes, scales)
    with pytest.raises(NativeError, match="offsets: int4_affine weights have them"):
        PackedMatrix(4, 64, "int8", 32).pack_codes(ctx, 0, codes, scales, offsets)
    with pytest.raises(NativeError, match="scales: expected float16"):
        PackedMatrix(4, 64, "int4").pack_codes(ctx, 0, codes, scales)
    with pytest.raises(NativeError, match="codes: expected uint8"):
        matrix.pack_codes(ctx, 0, scales, scales, offsets)
    for wrong in (codes[:, :63], codes[:3]):
        with pytest.raises(NativeError, match="expected"):
            matrix.pack_codes(ctx, 0, wrong, scales, offsets)
    with pytest.raises(NativeError, match="offsets: expected"):
        matrix.pack_codes(ctx, 0, codes, scales, offsets[:, :1])
    for row_start in (-1, 1, 2**62):
        with pytest.raises(NativeError, match="row_start: 4 rows from"):
            matrix.pack_codes(ctx, row_start, codes, scales, offsets)
    for order in ([0] * 64, list(range(1, 65)), list(range(63)), list(range(-1, 63))):
        with pytest.raises(NativeError, match="column_order: expected a permutation of the K=64"):
            matrix.column_order = order
    with pytest.raises(NativeError, match="column_order"):
        PackedMatrix(4, 64, "float32").column_order = list(range(64))
