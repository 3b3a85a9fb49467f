"""The gate of gpt-oss' experts."""

from __future__ import annotations

import torch

from engine import _native
from engine._native import ExecutionContext


def clamped_swiglu(
    ctx: ExecutionContext, gate_up: torch.Tensor, alpha: float, limit: float, out: torch.Tensor
) -> None:
    """out = (up + 1) * gate * sigmoid(alpha * gate), with gate at most `limit` and up within ± `limit`.

    Shapes: `gate_up` float32 [T, 2 I], gate first; `out` float32 [T, I].
    Source: OpenAI 2025 (gpt-oss model card), section 2.2.
    """
    _native.clamped_swiglu(ctx, gate_up, alpha, limit, out)
