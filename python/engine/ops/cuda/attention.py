"""Keys and values of a step into the paged cache of a GPU, and attention over it."""

from __future__ import annotations

import torch

from engine import _native
from engine.ops.cuda.context import ExecutionContext


def append_kv(
    ctx: ExecutionContext,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_ids: torch.Tensor,
    kv_scales: torch.Tensor | None = None,
) -> None:
    """Store token t in slot `slot_ids[t]`; a token whose slot lies outside the cache is not stored.

    A cache of fp8 (e4m3) holds codes: each token and KV head gets the scale that makes its largest number
    448; NaN where a number is not finite.
    Shapes: `k`, `v` [T, G, D] of the model's dtype, rows at multiples of 16 bytes; `k_cache`, `v_cache`
    [N, G, S, D] of that dtype, or float8_e4m3fn with `kv_scales` float32 [N, G, 2, S], those of keys and
    those of values; `slot_ids` int64 [T], distinct where they lie in the cache; D and S multiples of 16, D
    up to 256.
    """
    _native.cuda.append_kv(k, v, k_cache, v_cache, slot_ids, kv_scales)


def rope_append_kv(
    ctx: ExecutionContext,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_ids: torch.Tensor,
    kv_scales: torch.Tensor | None = None,
) -> None:
    """Turn `q` in place, and store the turned keys and the values as `append_kv` does, in one launch.

    Angles are computed with in float32, and only the result is rounded. `k` itself stays as it is: nothing
    reads it afterwards. A row whose position lies outside the tables is not turned.
    Shapes: as `append_kv`; `q` [T, H, D]; `cos`, `sin` float32 [P, R / 2]; `positions` int32 [T].
    """
    _native.cuda.rope_append_kv(q, k, v, cos, sin, positions, k_cache, v_cache, slot_ids, kv_scales)
