"""The same work by flashinfer, where it is installed; else, or where it refuses, what is in the way."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from device import relative_error, time_graph

WORKSPACE_BYTES = 256 << 20
MOST_REPEATS = 50


def by_flashinfer(
    name: str,
    make: Callable[[Any], Callable[[], torch.Tensor]],
    expected: torch.Tensor | None = None,
    error: float = 0.0,
) -> float | str:
    """Microseconds of what `make` gives for the module, checked against `expected`; or a reason why not.

    Its first use may compile for minutes. Whatever it raises is told, and the bench goes on.
    """
    if importlib.util.find_spec("flashinfer") is None:
        print(f"{name}: flashinfer is not installed")
        return "not installed"
    try:
        import flashinfer

        call = make(flashinfer)
        found = call()
        if expected is not None and not relative_error(found, expected) <= error:
            raise ValueError(f"its result differs by {relative_error(found, expected):.3g}")
        timing = time_graph([call], repeats=MOST_REPEATS)
    except Exception as refusal:  # another version's arguments, or no compiler
        reason = " ".join(f"{type(refusal).__name__}: {refusal}".split())[:200]
        print(f"{name}: flashinfer did not run: {reason}")
        return reason
    print(f"{name}: flashinfer {flashinfer.__version__} {timing}")
    return timing.median_us


def decode_attention(
    module: Any, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, plan: Any, scale: float
) -> Callable[[], torch.Tensor]:
    """One query a sequence. Pages lie as ours do, which it calls HND."""
    wrapper = module.BatchDecodeWithPagedKVCacheWrapper(_workspace(q), "HND", use_tensor_cores=True)
    _, num_kv_heads, page_size, head_dim = keys.shape
    sizes = q.shape[1], num_kv_heads, head_dim, page_size
    wrapper.plan(
        *_pages(plan, page_size), *sizes, q_data_type=q.dtype, kv_data_type=keys.dtype, sm_scale=scale
    )
    return lambda: wrapper.run(q, (keys, values))


def prefill_attention(
    module: Any, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, plan: Any, scale: float
) -> Callable[[], torch.Tensor]:
    wrapper = module.BatchPrefillWithPagedKVCacheWrapper(_workspace(q), "HND")
    _, num_kv_heads, page_size, head_dim = keys.shape
    sizes = q.shape[1], num_kv_heads, head_dim, page_size
    types = {"q_data_type": q.dtype, "kv_data_type": keys.dtype}
    wrapper.plan(plan.cu_seqlens_q, *_pages(plan, page_size), *sizes, causal=True, sm_scale=scale, **types)
    return lambda: wrapper.run(q, (keys, values))


def _workspace(q: torch.Tensor) -> torch.Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)


def _pages(plan: Any, page_size: int) -> Sequence[torch.Tensor]:
    """Ends of each sequence's pages, their numbers, and how many tokens the last has: int32."""
    counts = (plan.kv_lens + page_size - 1) // page_size
    ends = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    pages = torch.cat([row[:count] for row, count in zip(plan.block_tables, counts.tolist(), strict=True)])
    return ends, pages, (plan.kv_lens - 1) % page_size + 1
