"""The non-linear part of an MLP, gated or not."""

from __future__ import annotations

import torch

from engine import _native
from engine._native import ExecutionContext, PackedMatrix

GATE_UP_MULTIPLE = 64
"""Of the rows of a matrix for `gated_linear`, so that gate and up each fill whole panels."""


def silu_mul(ctx: ExecutionContext, gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """out = silu(gate) * up. Shapes: `gate_up` float32 [T, 2 I], gate first; `out` float32 [T, I]."""
    _native.silu_mul(ctx, gate_up, out)


def gelu_mul(ctx: ExecutionContext, gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """out = gelu(gate) * up, gelu in the tanh form that Gemma uses. Shapes: as `silu_mul`.

    Source: Hendrycks and Gimpel 2016, section 2.
    """
    _native.gelu_mul(ctx, gate_up, out)


def erf_gelu_mul(ctx: ExecutionContext, gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """out = gelu(gate) * up, gelu in its exact form, as ModernBERT uses it. Shapes: as `silu_mul`."""
    _native.erf_gelu_mul(ctx, gate_up, out)


def gated_linear(
    ctx: ExecutionContext,
    x: torch.Tensor,
    weight: PackedMatrix,
    bias: torch.Tensor | None,
    activation: str,
    out: torch.Tensor,
) -> None:
    """`linear` to gate and up, then activation(gate) * up: "silu", "gelu_tanh" or "gelu". In one pass, which
    neither writes nor reads gate and up as a whole; with the bits of the two ops.

    Shapes: x float32 [T, K]; weight [2 I, K], gate first, 2 I a multiple of `GATE_UP_MULTIPLE`; bias float32
    [2 I]; out float32 [T, I], which must not overlap x.
    """
    _native.gated_linear(ctx, x, weight, bias, activation, out)


def gated_mlp(
    ctx: ExecutionContext,
    x: torch.Tensor,
    gate_up: PackedMatrix,
    gate_up_bias: torch.Tensor | None,
    activation: str,
    product: torch.Tensor,
    down: PackedMatrix,
    down_bias: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """`gated_linear` to `product`, and `linear` of that with `down`; with the bits of the two ops. Quantised
    weights multiply what stays in the caches, and `product` is memory that may hold anything afterwards.

    Shapes: as of `gated_linear` and `linear`, `product` being float32 [T, I]. No two tensors may overlap.
    """
    _native.gated_mlp(ctx, x, gate_up, gate_up_bias, activation, product, down, down_bias, out)


def activate(ctx: ExecutionContext, x: torch.Tensor, activation: str, out: torch.Tensor) -> None:
    """out = activation(x): "gelu" (exact), "gelu_tanh", "silu", "relu" or "tanh". `out` may be `x`.

    Shapes: `x`, `out` float32 [T, n], rows contiguous.
    """
    _native.activate(ctx, x, activation, out)
