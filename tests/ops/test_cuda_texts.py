"""What encoders need of the CUDA backend beside a decoder's ops, by torch: norms, activations and pooling."""

from __future__ import annotations

import pytest
import torch

from engine.ops import cuda, reference
from helpers.triton_kernels import DEVICE

UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
DTYPES = list(UNIT_ROUNDOFF)
SUMMED = 2.0**-20
"""Of float32 sums of few hundred numbers, and of its functions."""


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def assert_rounded_once(found: torch.Tensor, expected: torch.Tensor, scale: float = 1.0) -> None:
    """`expected` is not rounded; numbers of that size were added."""
    found, error = found.cpu(), SUMMED * scale
    bound = UNIT_ROUNDOFF[found.dtype] * expected.abs() + error
    assert ((found.double() - expected.double()).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_layer_norm(dtype, has_bias):
    x, residual = normal(5, 192, dtype=dtype), normal(5, 193, dtype=dtype)[:, 1:].contiguous()
    weight, bias = normal(192), normal(1, 192)[0] if has_bias else None
    wide = torch.empty(5, 192, dtype=torch.float64)
    reference.layer_norm(None, x, None, weight, bias, 1e-5, wide)
    placed = [None if t is None else t.to(DEVICE) for t in (weight, bias)]
    out = torch.full_like(x, float("nan"), device=DEVICE)
    cuda.layer_norm(None, x.to(DEVICE), None, *placed, 1e-5, out)
    assert_rounded_once(out, wide, scale=8.0)
    # With a residual, which is rounded; the result may be where that was.
    total = residual + x
    reference.layer_norm(None, total, None, weight, bias, 1e-5, wide)
    kept, update = residual.to(DEVICE, copy=True), x.to(DEVICE)
    cuda.layer_norm(None, update, kept, *placed, 1e-5, out)
    assert torch.equal(kept.cpu(), total)
    assert_rounded_once(out, wide, scale=8.0)
    aliased = residual.to(DEVICE, copy=True)
    cuda.layer_norm(None, update, aliased, *placed, 1e-5, aliased)
    assert torch.equal(aliased, out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu", "relu", "tanh"])
def test_activations_in_place(name, dtype):
    x, expected = 3 * normal(4, 100).to(dtype), torch.empty(4, 100, dtype=torch.float64)
    reference.activate(None, x, name, expected)
    found = x.to(DEVICE)
    cuda.activate(None, found, name, found)
    assert_rounded_once(found, expected, scale=4.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["sum", "weighted_sum", "max"])
def test_pooling_in_pieces(mode, dtype):
    """Texts that began before, and one that begins here; what was taken before counts."""
    x, before = normal(11, 64, dtype=dtype), normal(3, 64)
    cu_rows, firsts = torch.tensor([0, 1, 4, 11]).int(), torch.tensor([5, 0, 40]).int()
    expected = before.double()
    reference.pool(None, x, cu_rows, firsts, mode, expected)
    out = before.to(DEVICE)
    cuda.pool(None, *(t.to(DEVICE) for t in (x, cu_rows, firsts)), mode, out)
    assert out.dtype == torch.float32
    assert_rounded_once(out, expected, scale=1000.0 if mode == "weighted_sum" else 16.0)
