"""Norms, gates, soft caps and lookups as the GPU runs them, against the emulator."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch

from engine import _native
from engine.ops.cuda import gated, norm
from helpers.cuda_host import emulated_ops

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(op: Callable, *arguments: object) -> None:
    """All tensors, those that are written among them, are the same afterwards, but for last bits."""
    results = []
    for device in ("cpu", "cuda"):
        own = [a.to(device, copy=True) if isinstance(a, torch.Tensor) else a for a in arguments]
        with emulated_ops() if device == "cpu" else contextlib.nullcontext():
            op(None, *own)
        results.append([tensor.cpu() for tensor in own if isinstance(tensor, torch.Tensor)])
    torch.testing.assert_close(results[1], results[0])


def unwritten(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


@pytest.mark.parametrize("n", [1, 100, 896, 4096, 9000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(dtype, n):
    torch.manual_seed(n)
    x, residual = (torch.randn(5, n).to(dtype) for _ in range(2))
    weight, out = torch.randn(n), unwritten(5, n, dtype=dtype)
    check(norm.rms_norm, x, weight, 1e-5, out)
    check(norm.add_rms_norm, x, residual, weight, 1e-5, out)


@pytest.mark.parametrize("n", [7, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates(dtype, n):
    torch.manual_seed(n)
    gate_up, out = (4 * torch.randn(5, 2 * n)).to(dtype), unwritten(5, n, dtype=dtype)
    for gate in (gated.silu_mul, gated.gelu_mul, gated.erf_gelu_mul):
        check(gate, gate_up, out)
    check(gated.clamped_swiglu, gate_up, 1.702, 7.0, out)


@pytest.mark.parametrize("n", [7, 4096])
def test_soft_caps(n):
    torch.manual_seed(n)
    check(gated.softcap, 50 * torch.randn(5, n), 30.0)


@pytest.mark.parametrize("n", [7, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lookups(dtype, n):
    ids = torch.tensor([3, 0, -1, 9, 10], dtype=torch.int32)
    weight = torch.randn(10, n).to(dtype)
    check(
        lambda _ctx, *arguments: _native.cuda.embedding(*arguments),
        ids,
        weight,
        unwritten(5, n, dtype=dtype),
    )
