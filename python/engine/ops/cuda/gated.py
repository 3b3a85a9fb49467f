"""What happens element by element on a GPU: activations and gates of MLPs, and the smooth bound on logits."""

from __future__ import annotations

import functools

import torch

from engine import _native
from engine.ops.cuda.context import ExecutionContext

_ACTIVATIONS = {
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "relu": torch.relu,
    "tanh": torch.tanh,
}


def silu_mul(ctx: ExecutionContext, gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """out = silu(gate) * up, computed in float32 and rounded once.

    Shapes: `gate_up` [T, 2 I] of the model's dtype, gate first; `out` [T, I] of the same.
    """
    _native.cuda.silu_mul(gate_up, out)


def gelu_mul(ctx: ExecutionContext, gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """out = gelu(gate) * up, gelu in its tanh form. Shapes: as `silu_mul`."""
    _native.cuda.gelu_mul(gate_up, out)


def erf_gelu_mul(ctx: ExecutionContext, gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """out = gelu(gate) * up, gelu in its exact form. Shapes: as `silu_mul`."""
    _native.cuda.erf_gelu_mul(gate_up, out)


def clamped_swiglu(
    ctx: ExecutionContext, gate_up: torch.Tensor, alpha: float, limit: float, out: torch.Tensor
) -> None:
    """out = (up + 1) * gate * sigmoid(alpha * gate), with gate at most `limit` and up within ± `limit`.

    Shapes: as `silu_mul`.
    """
    _native.cuda.clamped_swiglu(gate_up, alpha, limit, out)


def activate(ctx: ExecutionContext, x: torch.Tensor, activation: str, out: torch.Tensor) -> None:
    """out = activation(x), by torch, in float32 and rounded once; names as for `engine.ops.gated.activate`.
    `out` may be `x`.

    Shapes: `x`, `out` [T, n] of the model's dtype.
    """
    out.copy_(_ACTIVATIONS[activation](x))


def softcap(ctx: ExecutionContext, x: torch.Tensor, cap: float) -> None:
    """x = cap * tanh(x / cap), in place. Shapes: `x` float32 [T, n]."""
    _native.cuda.softcap(x, cap)
