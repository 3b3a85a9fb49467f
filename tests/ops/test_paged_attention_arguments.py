"""What paged_attention is asked that it refuses, or that leaves it nothing to do."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from engine.errors import NativeError
from engine.ops.paged_attention import paged_attention
from helpers.attention import attend, make_case
from helpers.compare import assert_same_bits
from helpers.native import ISAS, context


@pytest.mark.parametrize("sequences", [[], [(0, 0)], [(0, 40), (0, 3)]])
def test_steps_without_rows(sequences):
    case = make_case(sequences, heads=2, kv_heads=1, head_dim=64)
    case.plan.kv_lens.mul_(1000)  # of sequences without rows only their number counts
    assert attend(case, ISAS[-1]).shape == (0, 2, 64)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_q": int32(1, 2, 5)}, "cu_seqlens_q: expected to begin with 0, got 1"),
        (
            {"cu_seqlens_q": int32(0, 6, 5)},
            "cu_seqlens_q: expected an end of at most T, that is 5 for sequence 0, got 6",
        ),
        (
            {"cu_seqlens_q": int32(0, 5, 4)},
            "cu_seqlens_q: expected an end of at least 5 for sequence 1, got 4",
        ),
        (
            {"cu_seqlens_q": int32(0, -(2**31), 5)},
            "cu_seqlens_q: expected an end of at least 0 for sequence 0",
        ),
        ({"cu_seqlens_q": int32(0, 1, 4)}, "cu_seqlens_q: expected to end with T=5, got 4"),
        ({"cu_seqlens_q": int32(0, 5)}, r"cu_seqlens_q: expected \[3\], got \[2\]"),
        ({"cu_seqlens_q": torch.tensor([0, 1, 5])}, "cu_seqlens_q: expected int32, got int64"),
        ({"kv_lens": int32(20, 3)}, "kv_lens: expected at least the number of rows, 4 for sequence 1, got 3"),
        (
            {"kv_lens": int32(-1, 20)},
            "kv_lens: expected at least the number of rows, 1 for sequence 0, got -1",
        ),
        ({"kv_lens": int32(20, 49)}, "block_tables: expected columns, at least 4 for sequence 1, got 3"),
        (
            {"kv_lens": int32(2**31 - 1, 20)},
            "block_tables: expected columns, at least 134217728 for sequence 0",
        ),
        ({"block_tables": int32(0, 1, 0, 0, 6, 0).view(2, 3)}, "block ids from 0 to 5 for sequence 1, got 6"),
        (
            {"block_tables": int32(-1, 1, 0, 0, 2, 0).view(2, 3)},
            "block ids from 0 to 5 for sequence 0, got -1",
        ),
        (
            {"block_tables": int32(0, 1, 2).view(1, 3)},
            r"block_tables: expected \[B=2, max_blocks\], got \[1, 3\]",
        ),
        (
            {"q": torch.ones(5, 3, 64), "out": torch.ones(5, 3, 64)},
            "q: expected a multiple of G=2 heads, got 3",
        ),
        ({"q": torch.ones(5, 4, 80)}, r"k_cache: expected \[N, G, D=80, S\]"),
        ({"q": torch.ones(5, 4, 64).double()}, "q: expected float32, got float64"),
        ({"q": torch.ones(5, 4, 128)[..., ::2]}, "q: expected contiguous rows"),
        ({"out": torch.ones(4, 4, 64)}, r"out: expected \[T=5, H=4, D=64\], got \[4, 4, 64\]"),
        ({"v_cache": torch.ones(6, 2, 16, 64)}, "v_cache: expected bfloat16, got float32"),
        ({"v_cache": torch.ones(5, 2, 16, 64).bfloat16()}, r"v_cache: expected \[N=6, G=2, S=16, D=64\]"),
        (
            {"k_cache": torch.ones(6, 0, 64, 16).bfloat16(), "v_cache": torch.ones(6, 0, 16, 64).bfloat16()},
            "of G=0",
        ),
        ({"kv_scales": torch.ones(6, 2, 2, 16)}, "kv_scales: expected None beside a cache of floats"),
        (
            {"k_cache": torch.ones(6, 2, 64, 16).char(), "v_cache": torch.ones(6, 2, 16, 64).char()},
            "kv_scales: expected those of an int8 cache, got None",
        ),
        ({"scale": float("nan")}, "scale: expected a finite number"),
        ({"scale": float("inf")}, "scale: expected a finite number"),
        ({"window": -1}, "window: expected 0 or more, got -1"),
        ({"softcap": -1.0}, "softcap: expected 0 or more"),
        ({"sinks": torch.zeros(3)}, r"sinks: expected \[H=4\], got \[3\]"),
        ({"softcap": float("nan")}, "softcap: expected 0 or more"),
    ],
)
def test_wrong_arguments_are_refused_and_write_nothing(change, message):
    case = make_case([(1, 20), (4, 20)], heads=4, kv_heads=2, head_dim=64)
    assert len(case.k_cache) == 6
    plan = dataclasses.replace(
        case.plan,
        **{name: change[name] for name in ("cu_seqlens_q", "kv_lens", "block_tables") if name in change},
    )
    arguments = {"q": case.q, "k_cache": case.k_cache, "v_cache": case.v_cache, "plan": plan}
    arguments |= {"scale": 0.125, "window": 0, "softcap": 0.0, "out": torch.zeros(5, 4, 64), "sinks": None}
    arguments |= {"kv_scales": None}
    arguments |= {name: value for name, value in change.items() if name in arguments}
    kept = arguments["out"].clone()
    with pytest.raises(NativeError, match=message):
        paged_attention(context(ISAS[-1]), **arguments)
    assert torch.equal(arguments["out"], kept)


@pytest.mark.parametrize(
    ("head_dim", "block_size", "message"),
    [
        (8, 16, "q: expected a head dim of 16 to 256 in steps of 16, got 8"),
        (72, 16, "q: expected a head dim of 16 to 256 in steps of 16, got 72"),
        (272, 16, "q: expected a head dim of 16 to 256 in steps of 16, got 272"),
        (64, 8, "k_cache: expected a block size of 16 to 256 in steps of 16, got 8"),
        (64, 24, "k_cache: expected a block size of 16 to 256 in steps of 16, got 24"),
        (64, 272, "k_cache: expected a block size of 16 to 256 in steps of 16, got 272"),
    ],
)
def test_unsupported_sizes_are_refused(head_dim, block_size, message):
    with pytest.raises(NativeError, match=message):
        attend(make_case([(1, 5)], heads=2, kv_heads=2, head_dim=head_dim, block_size=block_size), ISAS[-1])


def test_blocks_outside_the_window_are_not_looked_up():
    case = make_case([(2, 600)], heads=2, kv_heads=1, head_dim=64)
    expected = attend(case, ISAS[-1], window=100)
    first_seen = (600 - 2 - 99) // 16
    case.plan.block_tables[0, :first_seen] = -1
    assert_same_bits(attend(case, ISAS[-1], window=100), expected)
    case.plan.block_tables[0, first_seen] = -1
    with pytest.raises(NativeError, match="block_tables: expected block ids"):
        attend(case, ISAS[-1], window=100)
