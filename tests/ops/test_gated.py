"""silu_mul and gelu_mul against their reference, on every instruction set of the machine."""

from __future__ import annotations

import pytest
import torch

from engine.errors import NativeError
from engine.ops import reference
from engine.ops.gated import gelu_mul, silu_mul
from helpers.compare import EPSILON, GuardedOutput, assert_close, assert_same_bits
from helpers.native import FMA_ISAS, ISAS, context

OPS = [(silu_mul, reference.silu_mul), (gelu_mul, reference.gelu_mul)]


def inputs(num_rows: int, n: int) -> torch.Tensor:
    """Gates of every size and sign, the ends of exp's range among them."""
    gates = torch.cat(
        [torch.linspace(-120, 120, 601), torch.logspace(-40, 30, 281), -torch.logspace(-40, 30, 281)]
    )
    generator = torch.Generator().manual_seed(n)
    picks = torch.randint(len(gates), (num_rows, n), generator=generator)
    return torch.cat([gates[picks], torch.randn(num_rows, n, generator=generator)], 1)


def bound(op, gate_up: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Seven roundings, exp's own two among them, and those of the exponent y, each of which weighs |y|.
    Added: what the kernels take for zero, and the cancellation in the reference's 1 + tanh."""
    gate, up = gate_up.double().chunk(2, -1)
    exponent = gate if op is silu_mul else 1.5957691216 * (gate + 0.044715 * gate**3)
    roundings = 7 + 4 * exponent.abs().clamp(max=100)
    cancellation = 0 if op is silu_mul else 2.0**-52 * (gate * up).abs()
    return expected.abs() * roundings * EPSILON + 1e-36 * (1 + up.abs()) + cancellation


@pytest.mark.parametrize("n", [1, 15, 16, 17, 100, 1000])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("op", "plain"), OPS)
def test_op_is_the_reference(op, plain, isa, n):
    gate_up = GuardedOutput(7, 2 * n).tensor.copy_(inputs(7, n))
    out, expected = GuardedOutput(7, n), torch.empty(7, n, dtype=torch.float64)
    op(context(isa), gate_up, out.tensor)
    plain(None, gate_up, expected)
    assert_close(out.tensor, expected, bound(op, gate_up, expected))
    out.assert_untouched_outside()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("op", [silu_mul, gelu_mul])
def test_the_ends_are_the_limits(op, isa):
    infinity, nan = float("inf"), float("nan")
    gates = torch.tensor([infinity, -infinity, -3e38, nan, 0.0, 3e38])
    out = torch.empty(1, 6)
    op(context(isa), torch.cat([gates, torch.ones(6)])[None], out)
    assert_same_bits(out[0, [0, 4, 5]], torch.tensor([infinity, 0.0, 3e38]))
    assert (out[0, [1, 2]] == 0).all() and out[0, 3].isnan()


@pytest.mark.parametrize("op", [silu_mul, gelu_mul])
def test_bits_do_not_depend_on_batch_threads_or_instruction_set(op):
    gate_up = inputs(40, 133)
    whole = torch.empty(40, 133)
    op(context(FMA_ISAS[-1], 3), gate_up, whole)
    for isa in FMA_ISAS:
        for row in range(40):
            alone = torch.empty(1, 133)
            op(context(isa, 1), gate_up[row : row + 1], alone)
            assert_same_bits(alone, whole[row : row + 1])


@pytest.mark.parametrize("op", [silu_mul, gelu_mul])
def test_empty_and_wrong_shapes(op):
    op(context(ISAS[-1]), torch.empty(0, 8), torch.empty(0, 4))
    op(context(ISAS[-1]), torch.empty(3, 0), torch.empty(3, 0))
    with pytest.raises(NativeError, match=r"gate_up: expected \[T=2, 8\], got \[2, 9\]"):
        op(context(ISAS[-1]), torch.zeros(2, 9), torch.zeros(2, 4))
    with pytest.raises(NativeError, match=r"gate_up: expected \[T=2, 8\], got \[3, 8\]"):
        op(context(ISAS[-1]), torch.zeros(3, 8), torch.zeros(2, 4))
