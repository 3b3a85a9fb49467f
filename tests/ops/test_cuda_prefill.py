"""Prefill attention of the CUDA backend against its reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from engine.ops import reference
from engine.ops.cuda.plan import TILE_ROWS, DevicePlan, split_rows
from helpers import triton_kernels
from helpers.attention import FP32, AttentionCase, both_ways, bound, make_case
from helpers.compare import assert_close, assert_same_bits
from helpers.triton_kernels import DEVICE

UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
SENTINEL = 77.0
# (query rows, cached tokens): decodes, which are another kernel's, whole prompts, and chunks after a prefix.
ROWS = [(1, 1), (17, 17), (2, 255), (1, 40), (9, 130)]


def device_plan(case: AttentionCase) -> DevicePlan:
    cu_seqlens_q = case.plan.cu_seqlens_q.numpy()
    rows, tiles = (torch.from_numpy(part) for part in split_rows(cu_seqlens_q))
    plan = case.plan
    return DevicePlan(
        plan.cu_seqlens_q.to(DEVICE),
        plan.kv_lens.to(DEVICE),
        plan.block_tables.to(DEVICE),
        plan.is_causal,
        decode_rows=rows.to(DEVICE),
        tiles=tiles.to(DEVICE),
        max_decode_kv_len=0,
        max_kv_len=int(plan.kv_lens.max()),
    )


def stored(case: AttentionCase, dtype: torch.dtype) -> AttentionCase:
    """With queries and cache as a GPU has them; coded caches keep their queries' dtype."""
    return dataclasses.replace(
        case, q=case.q.to(dtype), k_cache=case.k_cache.to(dtype), v_cache=case.v_cache.to(dtype)
    )


def coded(case: AttentionCase) -> AttentionCase:
    """A cache of float8_e4m3fn with a scale for each token and KV head."""
    k_scales = case.k_cache.float().abs().amax(2) / 448
    v_scales = case.v_cache.float().abs().amax(3) / 448
    return dataclasses.replace(
        case,
        k_cache=(case.k_cache.float() / k_scales[:, :, None]).to(torch.float8_e4m3fn),
        v_cache=(case.v_cache.float() / v_scales[..., None]).to(torch.float8_e4m3fn),
        kv_scales=torch.stack([k_scales, v_scales], 2),
    )


def attend(
    case: AttentionCase,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    **choices,
) -> torch.Tensor:
    """Rows of decodes are left as they are. Queries and results are columns of wider rows."""
    from engine.ops.cuda.attention import paged_attention
    from engine.ops.cuda.triton_prefill import prefill_attention

    ctx = triton_kernels.context(**choices)
    attention = paged_attention if ctx.is_deterministic else prefill_attention
    num_rows, heads, head_dim = case.q.shape
    wide = torch.zeros(num_rows, (heads + 1) * head_dim, dtype=case.q.dtype, device=DEVICE)
    q = wide[:, : heads * head_dim].unflatten(1, (heads, head_dim))
    q.copy_(case.q)
    results = torch.full_like(wide, SENTINEL)
    out = results[:, : heads * head_dim].unflatten(1, (heads, head_dim))
    attention(
        ctx,
        q,
        case.k_cache.transpose(2, 3).contiguous().to(DEVICE),
        case.v_cache.to(DEVICE),
        device_plan(case),
        head_dim**-0.5,
        window,
        softcap,
        out,
        None if sinks is None else sinks.to(DEVICE),
        None if case.kv_scales is None else case.kv_scales.to(DEVICE),
    )
    assert (results[:, heads * head_dim :] == SENTINEL).all()
    return out.cpu()


def check(
    case: AttentionCase,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    **choices,
) -> None:
    out = attend(case, window, softcap, sinks, **choices)
    wide = dataclasses.replace(
        case, q=case.q.float(), k_cache=case.k_cache.float(), v_cache=case.v_cache.float()
    )
    expected, magnitude = torch.empty(2, *case.q.shape, dtype=torch.float64)
    numbers = case.plan, case.q.shape[2] ** -0.5, window, softcap
    reference.paged_attention(
        None, wide.q, wide.k_cache, wide.v_cache, *numbers, expected, sinks, case.kv_scales
    )
    sizes = wide.v_cache.abs()
    reference.paged_attention(None, wide.q, wide.k_cache, sizes, *numbers, magnitude, sinks, case.kv_scales)
    # Sums in float32, and two roundings to the queries' dtype: of the weights and of the result.
    error = bound(wide, magnitude, softcap) + 2.02 * UNIT_ROUNDOFF[case.q.dtype] * magnitude
    if case.q.dtype == torch.float16:  # small weights, and results, are multiples of a smallest number
        values = wide.v_cache if case.kv_scales is None else wide.v_cache * case.kv_scales[:, :, 1, :, None]
        error += 2.0**-25 * (1 + case.plan.kv_lens.max() * (1 + torch.nan_to_num(values).abs().max()))
    counts = case.plan.cu_seqlens_q.diff()
    is_prefill = (counts > (0 if choices.get("is_deterministic") else 1)).repeat_interleave(counts)
    assert_close(out[is_prefill], expected[is_prefill], error[is_prefill])
    assert (out[~is_prefill] == SENTINEL).all()


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [
        (64, torch.float32),
        (80, torch.float16),
        (128, torch.bfloat16),
        (192, torch.bfloat16),
        (256, torch.float16),
    ],
)
def test_any_mix_of_rows_is_the_reference(head_dim, dtype):
    check(stored(make_case(ROWS, heads=4, kv_heads=2, head_dim=head_dim, dtype=FP32), dtype))


@pytest.mark.parametrize(("group", "num_rows"), [(1, TILE_ROWS + 3), (3, TILE_ROWS + 3), (7, 40), (64, 5)])
def test_any_number_of_heads_in_a_group(group, num_rows):
    rows = [(num_rows, num_rows + 20), (2, 2)]
    check(stored(make_case(rows, heads=group, kv_heads=1, head_dim=64, dtype=FP32), torch.bfloat16))


def test_one_path_for_all_rows():
    case = make_case(ROWS, heads=6, kv_heads=2, head_dim=64, dtype=FP32)
    check(stored(case, torch.bfloat16), is_deterministic=True)


def test_the_tiles_of_other_gpus():
    case = make_case(ROWS, heads=6, kv_heads=2, head_dim=64, dtype=FP32)
    check(stored(case, torch.bfloat16), isa="sm_86")


@pytest.mark.parametrize(("block_size", "dtype"), [(16, torch.bfloat16), (128, torch.float16)])
def test_a_cache_of_eight_bits(block_size, dtype):
    sizes = {"heads": 6, "kv_heads": 3, "head_dim": 96, "block_size": block_size}
    case = coded(make_case(ROWS, **sizes, dtype=FP32))
    check(dataclasses.replace(case, q=case.q.to(dtype)), softcap=20.0, sinks=torch.randn(6))


@pytest.mark.parametrize(
    ("window", "softcap", "is_causal"),
    [
        (0, 30.0, True),
        (1, 0.0, True),
        (64, 0.5, True),
        (65, 0.0, True),
        (10**12, 0.0, True),
        (0, 0.5, False),
        (1, 0.0, False),
        (64, 30.0, False),
    ],
)
def test_windows_soft_caps_and_sinks_are_the_reference(window, softcap, is_causal):
    case = stored(make_case(ROWS, heads=2, kv_heads=1, head_dim=64, dtype=FP32), torch.float32)
    sinks = torch.tensor([0.3, 40.0]) if softcap == 0.5 else None
    check(case if is_causal else both_ways(case), window, softcap, sinks)


def test_a_row_has_the_same_bits_in_any_chunk_and_any_batch():
    case = stored(
        make_case([(33, 170), (5, 40)], heads=4, kv_heads=2, head_dim=64, dtype=FP32), torch.bfloat16
    )
    exactly = {"window": 50, "is_deterministic": True}
    whole = attend(case, **exactly).float()
    for first, last in [(0, 2), (2, 19), (19, 33)]:
        assert_same_bits(attend(case.rows(0, first, last), **exactly).float(), whole[first:last])
    assert_same_bits(attend(case.rows(1, 0, 5), **exactly).float(), whole[33:])
    for sequence, row, place in [(0, 32, 32), (1, 0, 33)]:  # and as a decode
        alone = attend(case.rows(sequence, row, row + 1), **exactly)
        assert_same_bits(alone.float(), whole[place : place + 1])


def test_a_broken_key_breaks_the_rows_that_see_it_and_no_other_sequence():
    case = stored(
        make_case([(40, 40), (3, 30)], heads=2, kv_heads=1, head_dim=64, dtype=FP32), torch.bfloat16
    )
    block = case.plan.block_tables[0, 1]
    case.k_cache[block, :, :, 0] = float("nan")  # position 16
    out = attend(case)
    assert out[16:40].isnan().all()
    assert not out[:16].isnan().any() and not out[40:].isnan().any()


def test_nothing_to_do_is_no_launch():
    case = stored(make_case([(1, 9)], heads=2, kv_heads=1, head_dim=64, dtype=FP32), torch.bfloat16)
    assert (attend(case) == SENTINEL).all()
