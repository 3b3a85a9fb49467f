"""Keys and values of a step into the paged cache of a GPU, and attention over it."""

from __future__ import annotations

import torch

from engine import _native
from engine.ops.cuda.context import ExecutionContext
from engine.ops.cuda.plan import DevicePlan


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


def paged_attention(
    ctx: ExecutionContext,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: DevicePlan,
    scale: float,
    window: int,
    softcap: float,
    out: torch.Tensor,
    sinks: torch.Tensor | None = None,
    kv_scales: torch.Tensor | None = None,
) -> None:
    """As `engine.ops.paged_attention`, by one kernel for sequences with one query and another for the rest;
    where `ctx.is_deterministic` by the other for all, so that chunks change no bits.

    The first walks the keys in splits of 256 tokens, or of so many more that there are at most 64, and joins
    their results in order: a row's bits depend on its own length, not on its batch, on blocks, or on how many
    splits run at a time. Weights are rounded to the dtype of the cache before values are multiplied with
    them, of fp8 to bfloat16; sums are of float32.
    Shapes: `q`, `out` [T, H, D] of the model's dtype, rows at multiples of 16 bytes; the caches as
    `append_kv` writes them; `sinks` float32 [H]; H a multiple of G.
    Effects: launches only. Rows whose sequence or length the plan gives wrongly stay unwritten, and block ids
    outside the cache count for zeros: nothing outside the tensors is read.
    Cost: each key and value is read once for eight heads of a group.
    Source: Dao et al. 2023 (splits of keys, joined afterwards).
    """
    if len(plan.decode_rows) and not ctx.is_deterministic:
        num_rows, (_, num_heads, head_dim) = len(plan.decode_rows), q.shape
        sizes = num_rows, plan.max_decode_kv_len, window, num_heads, head_dim
        _native.cuda.decode_attention(
            q,
            k_cache,
            v_cache,
            plan.decode_rows,
            plan.cu_seqlens_q,
            plan.kv_lens,
            plan.block_tables,
            plan.max_decode_kv_len,
            scale,
            window,
            softcap,
            out,
            sinks,
            kv_scales,
            torch.empty(_native.cuda.num_partials(*sizes), dtype=torch.float32, device=q.device),
            ctx.arrivals,
        )
    if len(plan.tiles) or ctx.is_deterministic:
        from engine.ops.cuda.triton_prefill import prefill_attention  # Triton only where it is needed

        prefill_attention(
            ctx, q, k_cache, v_cache, plan, scale, window, softcap, out, sinks=sinks, kv_scales=kv_scales
        )
