"""gated_linear and gated_mlp: every bit of linear and then the op that joins gate and up, however the work is
split."""

from __future__ import annotations

import pytest
import torch

from engine.errors import NativeError
from engine.ops import reference
from engine.ops.gated import erf_gelu_mul, gated_linear, gated_mlp, gelu_mul, silu_mul
from engine.ops.linear import PackedMatrix, linear
from helpers.compare import GuardedOutput, assert_same_bits
from helpers.native import FMA_ISAS, ISAS, context

JOINS = {"silu": silu_mul, "gelu_tanh": gelu_mul, "gelu": erf_gelu_mul}
FORMATS = ["float32", "bfloat16", "int8", "int4"]
BLOCK_ROWS = (1, 7, 40, 97, 200)
"""Around the tiles and the blocks of rows that kernels take."""


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(inner: int, num_k: int, dtype: str) -> PackedMatrix:
    matrix = PackedMatrix(2 * inner, num_k, dtype)
    matrix.pack_rows(context(ISAS[-1]), 0, normal(2 * inner, num_k, seed=1))
    return matrix


def in_two_ops(ctx, x, matrix, bias, activation) -> torch.Tensor:
    gate_up = torch.full((len(x), matrix.out_features), float("nan"))
    linear(ctx, x, matrix, bias, gate_up)
    out = torch.full((len(x), matrix.out_features // 2), float("nan"))
    JOINS[activation](ctx, gate_up, out)
    return out


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("activation", JOINS)
def test_bits_are_those_of_the_two_ops(isa, dtype, activation):
    matrix, bias = packed(96, 600, dtype), normal(192, seed=2)
    for num_rows in BLOCK_ROWS if activation == "silu" else (3,):
        x = normal(num_rows, 600, seed=num_rows)
        x[::3, 5] *= 1000  # an outlier of quantised activations
        expected = in_two_ops(context(isa), x, matrix, bias, activation)
        for num_threads in (1, 3):
            out = GuardedOutput(num_rows, 96)
            gated_linear(context(isa, num_threads), x, matrix, bias, activation, out.tensor)
            assert_same_bits(out.tensor, expected)
            out.assert_untouched_outside()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [*FORMATS, "bf16_dot"])
@pytest.mark.parametrize("inner", [32, 128, 672])
def test_an_mlp_has_the_bits_of_its_two_products(isa, dtype, inner):
    gate_up, bias = packed(inner, 140, dtype), normal(2 * inner, seed=2)
    bias[inner + 3] = 1000  # outliers of the quantised product
    down, down_bias = PackedMatrix(70, inner, dtype), normal(70, seed=3)
    weights = normal(70, inner, seed=4)
    weights[:, 7] *= 50  # a column with a scale of its own
    if dtype == "int8":
        down.balance_columns(context(isa), [weights])
    down.pack_rows(context(isa), 0, weights)
    for num_rows in BLOCK_ROWS:
        x = normal(num_rows, 140, seed=num_rows)
        x[::3, 5] *= 1000
        if num_rows > 6:
            x[6, 0] = float("nan")
        expected = torch.empty(num_rows, 70)
        linear(context(isa), in_two_ops(context(isa), x, gate_up, bias, "silu"), down, down_bias, expected)
        for num_threads in (1, 3):
            product, out = GuardedOutput(num_rows, inner), GuardedOutput(num_rows, 70)
            ctx, weights = context(isa, num_threads), (down, down_bias)
            gated_mlp(ctx, x, gate_up, bias, "silu", product.tensor, *weights, out.tensor)
            assert_same_bits(out.tensor, expected)
            product.assert_untouched_outside()
            out.assert_untouched_outside()


@pytest.mark.parametrize("dtype", FORMATS)
def test_bits_do_not_depend_on_the_batch_or_the_instruction_set(dtype):
    matrix, x = packed(64, 300, dtype), normal(130, 300)
    whole = torch.empty(130, 64)
    gated_linear(context(FMA_ISAS[-1], 2), x, matrix, None, "silu", whole)
    for isa in FMA_ISAS:
        for row in (0, 64, 129):
            alone = torch.empty(1, 64)
            gated_linear(context(isa, 1), x[row : row + 1], matrix, None, "silu", alone)
            assert_same_bits(alone, whole[row : row + 1])


@pytest.mark.parametrize("activation", JOINS)
def test_the_reference_is_the_same_function(activation):
    plain, matrix = reference.PackedMatrix(64, 40, "float32"), PackedMatrix(64, 40, "float32")
    for each, ctx in ((plain, None), (matrix, context(ISAS[-1]))):
        each.pack_rows(ctx, 0, normal(64, 40, seed=1))
    x, out, expected = normal(5, 40), torch.empty(5, 32), torch.empty(5, 32)
    gated_linear(context(ISAS[-1]), x, matrix, None, activation, out)
    reference.gated_linear(None, x, plain, None, activation, expected)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_rows_may_be_strided_and_missing():
    matrix, wide = packed(32, 64, "bfloat16"), normal(9, 100)
    target = torch.full((9, 50), float("nan"))
    gated_linear(context(ISAS[-1]), wide[::2, 3:67], matrix, None, "silu", target[:5, 7:39])
    expected = in_two_ops(context(ISAS[-1]), wide[::2, 3:67], matrix, None, "silu")
    assert_same_bits(target[:5, 7:39].contiguous(), expected)
    assert target[5:].isnan().all() and target[:, :7].isnan().all() and target[:, 39:].isnan().all()
    gated_linear(context(ISAS[-1]), torch.empty(0, 64), matrix, None, "silu", torch.empty(0, 32))


def test_what_does_not_fit_is_refused():
    ctx, x, out = context(ISAS[-1]), torch.zeros(2, 8), torch.zeros(2, 32)
    matrix = packed(32, 8, "float32")
    with pytest.raises(NativeError, match="weight: expected a multiple of 64 rows, got 96"):
        gated_linear(ctx, x, packed(48, 8, "float32"), None, "silu", torch.zeros(2, 48))
    with pytest.raises(NativeError, match=r"out: expected \[T=2, N/2=32\], got \[2, 64\]"):
        gated_linear(ctx, x, matrix, None, "silu", torch.zeros(2, 64))
    with pytest.raises(NativeError, match="activation: expected silu, gelu_tanh or gelu"):
        gated_linear(ctx, x, matrix, None, "relu", out)
    with pytest.raises(NativeError, match="bias"):
        gated_linear(ctx, x, matrix, torch.zeros(32), "silu", out)
    with pytest.raises(NativeError, match="not all of its rows"):
        gated_linear(ctx, x, PackedMatrix(64, 8, "float32"), None, "silu", out)
