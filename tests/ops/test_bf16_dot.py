"""Products of bfloat16 weights with activations rounded to bfloat16 (decision 0020), on every set."""

from __future__ import annotations

import pytest
import torch

from engine.ops.gated import gated_linear, silu_mul
from engine.ops.linear import linear
from helpers.compare import assert_same_bits
from helpers.native import ISAS, context
from ops.test_linear import CHAIN, check, in_decided_order, normal, packed, product


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("num_rows", [0, 1, 2, 5, 12, 13, 31, 100])
def test_equals_reference_for_any_number_of_rows(isa, num_rows):
    check(isa, normal(num_rows, 300), normal(70, 300, seed=1), normal(70, seed=2), "bf16_dot")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("num_k", [1, 2, 7, 64, CHAIN - 1, CHAIN, CHAIN + 1, 2 * CHAIN + 1, 1000])
def test_equals_reference_for_any_shape(isa, num_k):
    for num_rows, num_outputs in [(1, 1), (5, 33), (40, 100)]:
        weight, bias = normal(num_outputs, num_k, seed=1), normal(num_outputs, seed=2)
        check(isa, normal(num_rows, num_k), weight, bias, "bf16_dot")
    check(isa, normal(9, num_k + 9)[::2, 3:-6], normal(40, num_k, seed=1), None, "bf16_dot")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("num_k", [1, 2, 3, 255, 257, 700])
def test_whole_numbers_are_exact(isa, num_k):
    """No rounding anywhere, so that each weight must have met its own activation."""
    generator = torch.Generator().manual_seed(num_k)
    x, weight = (torch.randint(-15, 16, (n, num_k), generator=generator).float() for n in (14, 70))
    assert_same_bits(product(context(isa), x, packed(weight, "bf16_dot")), x @ weight.T)


@pytest.mark.parametrize("isa", ISAS)
def test_a_row_has_the_same_bits_in_any_batch_with_any_threads(isa):
    for num_outputs, num_k in [(100, 1000), (33, 77)]:
        x, bias = normal(450, num_k), normal(num_outputs, seed=2)
        matrix = packed(normal(num_outputs, num_k, seed=1), "bf16_dot")
        first = product(context(isa, 1), x, matrix, bias)
        for num_threads in (2, 3):
            assert_same_bits(product(context(isa, num_threads), x, matrix, bias), first)
        for num_rows in range(1, 40, 3):
            rows = slice(7 * num_rows, 8 * num_rows)
            assert_same_bits(product(context(isa, 3), x[rows], matrix, bias), first[rows])


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa in ("avx2", "neon")])
def test_sets_without_the_instruction_keep_the_order_of_other_products(isa):
    pair = normal(3, 701), normal(33, 701, seed=1)
    x, weight = (factors.sign() * factors.abs().clamp(2**-7, 4).bfloat16() for factors in pair)
    bias = normal(33, seed=2)
    expected = in_decided_order(x.double().numpy(), weight.double().numpy(), bias.numpy())
    assert_same_bits(product(context(isa), x, packed(weight, "bf16_dot"), bias), torch.from_numpy(expected))


@pytest.mark.parametrize("isa", ISAS)
def test_activations_are_rounded_to_nearest_even(isa):
    x = torch.tensor([[1 + 2**-8, 0], [1 + 2**-8 + 2**-20, 0], [1 + 3 * 2**-8, 0], [-(1 + 2**-8), 0]])
    out = product(context(isa), x, packed(torch.eye(2), "bf16_dot"))
    assert out[:, 0].tolist() == [1, 1 + 2**-7, 1 + 2**-6, -1]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("num_k", [300, 301])
@pytest.mark.parametrize("num_rows", [1, 60])
def test_nan_and_infinity_stay_in_their_row_and_column(isa, num_rows, num_k):
    """Behind an odd number of k stand the next panel's weights, which must not be read as this one's."""
    x, weight = normal(num_rows, num_k), normal(70, num_k, seed=1)
    x[0, 7], weight[9, 3], weight[66, num_k - 1], weight[40, 0] = torch.tensor(
        [float("nan"), float("inf"), float("nan"), float("nan")]
    )
    out = product(context(isa), x, packed(weight, "bf16_dot"))
    is_finite = torch.ones(num_rows, 70, dtype=torch.bool)
    is_finite[0], is_finite[:, 9], is_finite[:, 66], is_finite[:, 40] = False, False, False, False
    assert out.isfinite().equal(is_finite)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("num_rows", [1, 50])
def test_gate_and_up_in_one_pass_have_the_bits_of_two(isa, num_rows):
    ctx, x, matrix = context(isa), normal(num_rows, 129), packed(normal(128, 129, seed=1), "bf16_dot")
    gate_up, expected, out = torch.empty(num_rows, 128), torch.empty(num_rows, 64), torch.empty(num_rows, 64)
    linear(ctx, x, matrix, None, gate_up)
    silu_mul(ctx, gate_up, expected)
    gated_linear(ctx, x, matrix, None, "silu", out)
    assert_same_bits(out, expected)
