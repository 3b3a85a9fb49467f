"""Products of the CUDA backend with weights of every format, against plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from engine.errors import NativeError
from engine.ops import reference, reference_quantized
from engine.ops.cuda import fp8_product
from engine.ops.cuda.codes import LARGEST_E4M3
from engine.ops.cuda.lookup import embedding
from engine.ops.cuda.matrix import PackedMatrix, linear
from helpers.compare import assert_close, assert_same_bits, sum_bound
from helpers.low_rank import normal
from helpers.triton_kernels import DEVICE, context

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
UNIT_ROUNDOFF = {BF16: 2.0**-8, FP16: 2.0**-11, FP32: 2.0**-24}
CODED = [("int8", 128), ("int8", 32), ("int4", 32), ("int4", 128), ("int4_affine", 32), ("int4_affine", 128)]


def empty_matrix(out_features: int, in_features: int, dtype: str, group_len: int = 0) -> PackedMatrix:
    with torch.device(DEVICE):
        return PackedMatrix(out_features, in_features, dtype, group_len)


def coded(dtype: str, group_len: int, num_outputs: int, num_k: int):
    """Every code, with scales of both signs, and of affine weights offsets: (codes, scales, offsets)."""
    generator = torch.Generator().manual_seed(num_k)
    codes = torch.randint(256 if dtype == "int8" else 16, (num_outputs, num_k), generator=generator)
    shape = num_outputs, -(-num_k // group_len)
    scales = torch.randn(shape, generator=generator) * 0.1
    offsets = torch.randn(shape, generator=generator) if dtype == "int4_affine" else None
    return codes.to(torch.uint8), scales.half() if dtype == "int4" else scales, offsets


def product(
    matrix: PackedMatrix,
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    **choices,
) -> torch.Tensor:
    """Of rows that lie in wider ones, into such."""
    wide = torch.full((len(x), matrix.out_features + 3), 77.0, dtype=out_dtype or x.dtype, device=DEVICE)
    out = wide[:, : matrix.out_features].fill_(float("nan"))
    rows = torch.cat([x, x], 1).to(DEVICE)[:, : x.shape[1]]
    linear(context(**choices), rows, matrix, None if bias is None else bias.to(DEVICE), out)
    assert (wide[:, matrix.out_features :] == 77.0).all()
    return out.cpu()


def check(
    matrix: PackedMatrix,
    weight: torch.Tensor,
    x: torch.Tensor,
    *,
    sizes: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    **choices,
) -> None:
    """Against the numbers [N, K] that the matrix stands for; `sizes` bounds what cancels in them."""
    out = product(matrix, x, bias, out_dtype, **choices)
    expected = x.double() @ weight.double().T
    magnitude = x.double().abs() @ (weight if sizes is None else sizes).double().abs().T
    if bias is not None:
        expected, magnitude = expected + bias, magnitude + bias.abs()
    # Any order of sums of products, which float32 rounds; a scale and an offset for each group; the last one.
    bound = sum_bound(magnitude, 2 * x.shape[1] + 8)
    assert_close(out, expected, bound + UNIT_ROUNDOFF[out.dtype] * (expected.abs() + bound))


@pytest.mark.parametrize(("dtype", "group_len"), CODED)
@pytest.mark.parametrize(("num_rows", "num_k"), [(1, 40), (17, 300)])
def test_codes_that_come_as_they_are(dtype, group_len, num_rows, num_k):
    codes, scales, offsets = coded(dtype, group_len, 37, num_k)
    matrix = empty_matrix(37, num_k, dtype, group_len)
    for first, last in ((20, 37), (0, 20)):
        part = None if offsets is None else offsets[first:last]
        matrix.pack_codes(None, first, codes[first:last], scales[first:last], part)
    weight = reference_quantized.dequantize(codes, scales, offsets, dtype, group_len)
    sizes = None
    if offsets is not None:  # scale * code and offset are added apart, and may cancel
        sizes = reference_quantized.dequantize(codes, scales.abs(), offsets.abs(), dtype, group_len)
    check(matrix, weight, normal(num_rows, num_k).to(BF16), sizes=sizes, bias=normal(37))


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_floats_are_rounded_as_on_the_cpu(dtype):
    weight = normal(20, 200)
    weight[:, 7] *= 50  # a column that is balanced
    weight[3] = 0
    matrix, oracle = empty_matrix(20, 200, dtype), reference.PackedMatrix(20, 200, dtype)
    for one in (matrix, oracle):
        if dtype == "int8":
            one.balance_columns(None, [weight[:8], weight[8:]])
        one.pack_rows(None, 8, weight[8:])
        one.pack_rows(None, 0, weight[:8].bfloat16())
    assert (torch.tensor(matrix.column_scales or [1.0] * 200) == oracle.column_scales).all()
    check(matrix, oracle.weight * oracle.column_scales, normal(5, 200).to(FP16))


def test_floats_of_eight_bits():
    weight = normal(20, 200) * torch.logspace(-6, 3, 20)[:, None]
    weight[3] = 0
    matrix = empty_matrix(20, 200, "fp8")
    matrix.pack_rows(None, 0, weight)
    scales = weight.abs().amax(1, keepdim=True) / LARGEST_E4M3
    rounded = torch.nan_to_num((weight / scales).to(torch.float8_e4m3fn).double() * scales)
    assert ((rounded - weight).abs() <= weight.abs() / 16 + scales * 2**-10).all()  # three bits; subnormals
    check(matrix, rounded, normal(5, 200).to(BF16), sizes=rounded.abs() * (1 + 2**-20))


@pytest.mark.parametrize("isa", ["sm_80", "sm_90"])
@pytest.mark.parametrize("num_rows", [0, 16, 64, 130])
def test_any_number_of_rows_on_any_gpu(isa, num_rows):
    matrix = empty_matrix(150, 140, "int8")
    parts = coded("int8", 128, 150, 140)
    matrix.pack_codes(None, 0, *parts)
    weight = reference_quantized.dequantize(*parts, "int8", 128)
    check(matrix, weight, normal(num_rows, 140).to(BF16), isa=isa)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("is_deterministic", [False, True])
def test_weights_of_floats(dtype, is_deterministic):
    weight = normal(70, 100).to(dtype)
    matrix = empty_matrix(70, 100, str(dtype).removeprefix("torch."))
    matrix.pack_rows(None, 0, weight.float())
    x = normal(9, 100).to(dtype)
    check(matrix, weight, x, is_deterministic=is_deterministic, out_dtype=FP32)
    if is_deterministic:  # torch rounds a bias, and on a CPU its sums, to bfloat16 first
        check(matrix, weight, x, is_deterministic=True, bias=normal(70))


@pytest.mark.parametrize("is_deterministic", [False, True])
def test_a_router_of_float32_is_not_rounded_beside_rows_of_bfloat16(is_deterministic):
    matrix, weight = empty_matrix(8, 100, "float32"), normal(8, 100)
    matrix.pack_rows(None, 0, weight)
    check(matrix, weight, normal(9, 100).to(BF16), is_deterministic=is_deterministic, out_dtype=FP32)


@pytest.mark.parametrize("kind", ["bfloat16", "int4_affine"])
def test_deterministic_rows_have_the_same_bits_in_any_batch(kind):
    matrix = empty_matrix(70, 300, kind)
    if kind == "bfloat16":
        matrix.pack_rows(None, 0, normal(70, 300))
    else:
        matrix.pack_codes(None, 0, *coded(kind, 32, 70, 300))
    x = normal(130, 300).to(BF16)
    together = product(matrix, x, is_deterministic=True)
    for rows in (slice(0, 1), slice(63, 66), slice(100, 130)):
        assert_same_bits(product(matrix, x[rows], is_deterministic=True).float(), together[rows].float())


def test_columns_in_another_order():
    order = torch.randperm(140, generator=torch.Generator().manual_seed(1))
    parts = coded("int4", 32, 20, 140)
    matrix = empty_matrix(20, 140, "int4")
    matrix.pack_codes(None, 0, *parts)
    matrix.column_order = order.tolist()
    weight = torch.empty(20, 140).index_copy_(1, order, reference_quantized.dequantize(*parts, "int4", 32))
    check(matrix, weight, normal(3, 140).to(BF16))
    assert matrix.column_order == order.tolist()


@pytest.mark.parametrize(("dtype", "group_len"), [*CODED, ("fp8", 0)])
def test_rows_are_looked_up(dtype, group_len):
    matrix, weight = empty_matrix(30, 1100, dtype, group_len), normal(30, 1100)
    if dtype == "fp8":
        matrix.pack_rows(None, 0, weight)
        scales = weight.abs().amax(1, keepdim=True) / LARGEST_E4M3
        weight = (weight / scales).to(torch.float8_e4m3fn).float() * scales
    else:
        parts = coded(dtype, group_len, 30, 1100)
        matrix.pack_codes(None, 0, *parts)
        weight = reference_quantized.dequantize(*parts, dtype, group_len)
        order = torch.randperm(1100, generator=torch.Generator().manual_seed(1))
        matrix.column_order = order.tolist()
        weight = torch.empty_like(weight).index_copy_(1, order, weight)
    ids = torch.tensor([29, 0, 30, 7, -1], dtype=torch.int32)
    out = torch.full((5, 1100), float("nan"), device=DEVICE)
    embedding(context(), ids.to(DEVICE), matrix, out)
    wanted = weight[[29, 0, 0, 7, 0]] * torch.tensor([1, 1, 0, 1, 0])[:, None]
    # A scale that is rounded otherwise, and a product and a sum where the other has one rounding.
    torch.testing.assert_close(out.cpu(), wanted, rtol=4 * 2.0**-23, atol=2.0**-20)


def test_a_matrix_knows_its_size():
    assert empty_matrix(10, 200, "bfloat16").num_bytes == 10 * 200 * 2
    assert empty_matrix(10, 256, "int8").num_bytes == 10 * (256 + 2 * 4)
    assert empty_matrix(10, 256, "int4").num_bytes == 10 * (128 + 8 * 2)
    assert empty_matrix(10, 256, "int4_affine", 128).num_bytes == 10 * (128 + 2 * 2 * 4)
    assert empty_matrix(10, 128, "fp8").num_bytes == 10 * (128 + 4)
    assert (empty_matrix(1, 1, "int4").group_len, empty_matrix(1, 1, "float16").group_len) == (32, 0)


def test_wrong_calls_are_refused_by_name():
    ints, floats = empty_matrix(4, 40, "int8"), empty_matrix(4, 40, "float32")
    codes, scales = torch.zeros(4, 40, dtype=torch.uint8), torch.zeros(4, 1)

    def refused(match: str, call, *args) -> None:
        with pytest.raises(NativeError, match=match):
            call(*args)

    refused("dtype: expected one of bfloat16", PackedMatrix, 1, 1, "int3")
    refused("group_len", PackedMatrix, 1, 1, "int8", 64)
    refused("group_len", PackedMatrix, 1, 1, "bfloat16", 32)
    refused("at least one row", PackedMatrix, 0, 1, "bfloat16")
    refused(r"weight: expected \[n, 40\]", floats.pack_rows, None, 0, torch.zeros(4, 41))
    refused("weight: rows 3 to 7", floats.pack_rows, None, 3, torch.zeros(4, 40))
    refused("weight: rows -1 to 3", floats.pack_rows, None, -1, torch.zeros(4, 40))
    refused("takes none", floats.pack_codes, None, 0, codes, scales)
    refused("takes none", empty_matrix(4, 40, "fp8").pack_codes, None, 0, codes, scales)
    refused(r"scales: expected \[4, 1\]", ints.pack_codes, None, 0, codes, torch.zeros(4, 2))
    refused("offsets: expected none", ints.pack_codes, None, 0, codes, scales, scales)
    refused(
        "offsets: expected some",
        empty_matrix(4, 32, "int4_affine").pack_codes,
        None,
        0,
        codes[:, :32],
        scales,
    )
    refused(
        "not rounded to int4_affine",
        empty_matrix(4, 40, "int4_affine").pack_rows,
        None,
        0,
        torch.zeros(4, 40),
    )
    refused("column_order", setattr, ints, "column_order", [0] * 40)
    ints.pack_codes(None, 0, codes[:3], scales[:3])
    refused("not all of its rows", linear, context(), torch.zeros(1, 40), ints, None, torch.zeros(1, 4))


# --- fp8 by torch


@pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9), reason="no fp8")
@pytest.mark.parametrize("num_k", [48, 256])
@pytest.mark.parametrize("is_wide", [False, True])
def test_torch_rounds_activations_and_nothing_else(num_k, is_wide, monkeypatch):
    """e4m3 has 3 bits behind the first: a factor errs by 2^-4 of itself at most, or below the smallest normal
    one by 2^-10 times the row's scale. The result has bfloat16's half bit, of the sum and of its bias."""
    monkeypatch.setattr(fp8_product, "LEAST_ROWS", 3)
    x, weight, bias = normal(5, num_k).to(BF16), normal(32, num_k), normal(32)
    x[1] = 0
    matrix = empty_matrix(32, num_k, "fp8")
    matrix.pack_rows(None, 0, weight)
    if is_wide:
        out = product(matrix, x, bias)
    else:
        out = torch.full((5, 32), float("nan"), dtype=BF16, device=DEVICE)
        linear(context(), x.to(DEVICE), matrix, bias.to(DEVICE), out)
        out = out.cpu()
    kept = (
        matrix.stored.cpu().view(torch.float8_e4m3fn)[:, :num_k].double()
        * matrix.scales.cpu()[:, None].double()
    )
    expected = x.double() @ kept.T + bias.double()
    scales = x.double().abs().amax(1, keepdim=True) / LARGEST_E4M3
    factor_errors = (2.0**-4 * x.double().abs()).maximum(2.0**-10 * scales)
    sizes = x.double().abs() @ kept.abs().T + bias.double().abs()
    bounds = factor_errors @ kept.abs().T + 3 * UNIT_ROUNDOFF[BF16] * sizes
    assert ((out.double() - expected).abs() <= bounds).all()
    assert (out.double() - expected)[1].abs().max() <= 2.0**-8 * bias.abs().max(), "a row of zeros"


def test_what_torch_is_not_chosen_for(monkeypatch):
    """Fewer rows, other dtypes and sizes, and bits that may not depend on the batch."""
    monkeypatch.setattr(fp8_product, "multiply", lambda *arguments: pytest.fail("torch's was chosen"))
    matrix = empty_matrix(32, 64, "fp8")
    matrix.pack_rows(None, 0, normal(32, 64))
    odd = empty_matrix(24, 64, "fp8")
    odd.pack_rows(None, 0, normal(24, 64))
    product(matrix, normal(5, 64).to(BF16))
    monkeypatch.setattr(fp8_product, "LEAST_ROWS", 3)
    product(matrix, normal(2, 64).to(BF16))
    product(matrix, normal(5, 64).to(FP16))
    product(matrix, normal(5, 64).to(BF16), out_dtype=FP32)
    product(matrix, normal(5, 64).to(BF16), is_deterministic=True)
    product(odd, normal(5, 64).to(BF16))
    with pytest.raises(pytest.fail.Exception):
        product(matrix, normal(5, 64).to(BF16))
