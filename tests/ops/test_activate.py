"""activate and erf_gelu_mul against their references, on every instruction set of the machine."""

from __future__ import annotations

import pytest
import torch

from engine.errors import NativeError
from engine.ops import reference
from engine.ops.gated import activate, erf_gelu_mul
from helpers.compare import EPSILON, GuardedOutput, assert_close, assert_same_bits
from helpers.native import FMA_ISAS, ISAS, context

ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu", "tanh")


def inputs(num_rows: int, n: int) -> torch.Tensor:
    """Values of every size and sign, dense where gelu bends."""
    values = torch.cat(
        [torch.linspace(-7, 7, 20001), torch.linspace(-120, 120, 601), torch.tensor([1e-30, -1e-30])]
    )
    return values[torch.randint(len(values), (num_rows, n), generator=torch.Generator().manual_seed(n))]


def bound(x: torch.Tensor, expected: torch.Tensor, activation: str) -> torch.Tensor:
    """gelu: erf to 4e-7 (see activations.h), times x / 2, and three roundings. Others: a few roundings,
    and that of the exponent, which weighs as much as the exponent is large."""
    x = x.double().abs()
    if activation == "gelu":
        return x / 2 * 4e-7 + 3 * EPSILON * (x + expected.abs()) + 1e-36
    exponent = {"gelu_tanh": 1.6 * (x + 0.045 * x**3), "silu": x, "relu": 0 * x, "tanh": 0 * x}[activation]
    return expected.abs() * (8 + 4 * exponent.clamp(max=100)) * EPSILON + 2.0**-52 * x + 1e-36


@pytest.mark.parametrize("n", [1, 15, 16, 17, 1000])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("isa", ISAS)
def test_activate_is_the_reference(isa, activation, n):
    x = GuardedOutput(7, n).tensor.copy_(inputs(7, n))
    out, expected = GuardedOutput(7, n), torch.empty(7, n, dtype=torch.float64)
    activate(context(isa), x, activation, out.tensor)
    reference.activate(None, x, activation, expected)
    assert_close(out.tensor, expected, bound(x, expected, activation))
    out.assert_untouched_outside()
    activate(context(isa), x, activation, x)
    assert_same_bits(x, out.tensor)


@pytest.mark.parametrize("isa", ISAS)
def test_erf_gelu_mul_is_the_reference(isa):
    gate, up = inputs(5, 333), torch.randn(5, 333)
    out, expected = torch.empty(5, 333), torch.empty(5, 333, dtype=torch.float64)
    erf_gelu_mul(context(isa), torch.cat([gate, up], 1), out)
    reference.erf_gelu_mul(None, torch.cat([gate, up], 1), expected)
    plain = torch.nn.functional.gelu(gate.double())
    assert_close(out, expected, (bound(gate, plain, "gelu") + EPSILON * plain.abs()) * up.abs() + 1e-36)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bits_do_not_depend_on_batch_threads_or_instruction_set(activation):
    x = inputs(40, 133)
    whole = torch.empty(40, 133)
    activate(context(FMA_ISAS[-1], 3), x, activation, whole)
    for isa in FMA_ISAS:
        for row in range(40):
            alone = torch.empty(1, 133)
            activate(context(isa, 1), x[row : row + 1], activation, alone)
            assert_same_bits(alone, whole[row : row + 1])


def test_a_nan_stays_one():
    for activation in ("gelu", "gelu_tanh", "silu"):
        out = torch.zeros(1, 3)
        activate(context(ISAS[-1]), torch.tensor([[1.0, float("nan"), 2.0]]), activation, out)
        assert out.isnan().tolist() == [[False, True, False]]


def test_wrong_arguments_are_refused():
    with pytest.raises(NativeError, match="activation: expected gelu, .* got 'swish'"):
        activate(context(ISAS[-1]), torch.zeros(1, 3), "swish", torch.zeros(1, 3))
    with pytest.raises(NativeError, match=r"out: expected \[T=1, n=3\], got \[1, 4\]"):
        activate(context(ISAS[-1]), torch.zeros(1, 3), "relu", torch.zeros(1, 4))
