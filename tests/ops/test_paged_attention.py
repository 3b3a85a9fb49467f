"""paged_attention against its reference, for any rows, shapes, windows and scores."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.attention import BF16, FP32, INT8, MIX, attend, both_ways, check, make_case
from helpers.compare import EPSILON, assert_close, assert_same_bits
from helpers.native import ISAS


@pytest.mark.parametrize("head_dim", range(16, 257, 16))
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("isa", ISAS)
def test_every_head_dim(isa, dtype, head_dim):
    rows = [(1, 1), (17, 17), (3, 255), (2, 257)]
    check(make_case(rows, heads=4, kv_heads=2, head_dim=head_dim, dtype=dtype), isa)


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("group", [1, 2, 7])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [BF16, FP32, INT8])
@pytest.mark.parametrize("isa", ISAS)
def test_any_mix_of_rows_is_the_reference(isa, dtype, head_dim, group, block_size):
    check(
        make_case(
            MIX,
            heads=2 * group,
            kv_heads=2,
            head_dim=head_dim,
            block_size=block_size,
            dtype=dtype,
            seed=group,
        ),
        isa,
    )


@pytest.mark.parametrize("softcap", [0.0, 0.5, 30.0])
@pytest.mark.parametrize("window", [0, 1, 5, 64, 256, 257, 10**12])
@pytest.mark.parametrize("isa", ISAS)
def test_windows_and_soft_caps_are_the_reference(isa, window, softcap):
    case = make_case([*MIX, (300, 555)], heads=3, kv_heads=1, head_dim=32, block_size=48)
    check(case, isa, window, softcap)


WHOLE = [(1, 1), (15, 15), (16, 16), (17, 17), (255, 255), (257, 257), (600, 600)]


@pytest.mark.parametrize("window", [0, 1, 5, 64, 256, 257, 10**12])
@pytest.mark.parametrize("isa", ISAS)
def test_seeing_both_ways_is_the_reference(isa, window):
    for head_dim in (16, 32, 64):
        case = make_case(WHOLE, heads=2, kv_heads=2, head_dim=head_dim, block_size=16, dtype=FP32)
        check(both_ways(case), isa, window)
    check(both_ways(make_case(MIX, heads=3, kv_heads=1, head_dim=32, block_size=48)), isa, window)


@pytest.mark.parametrize("window", [0, 64])
@pytest.mark.parametrize("isa", ISAS)
def test_sinks_are_the_reference(isa, window):
    """Sinks that are lost, weigh about as much as the keys, and take nearly all."""
    case = make_case([*MIX, (300, 555)], heads=8, kv_heads=2, head_dim=64)
    check(case, isa, window, sinks=torch.tensor([-100.0, -3.0, 0.0, 1.0, 3.0, 5.0, 9.0, 30.0]))


@pytest.mark.parametrize("isa", ISAS)
def test_more_heads_a_group_than_a_tile_holds(isa):
    check(make_case([(3, 20), (1, 300)], heads=71, kv_heads=1, head_dim=64), isa)


@settings(max_examples=60, deadline=None)
@given(
    sequences=st.lists(
        st.tuples(st.integers(0, 70), st.integers(0, 600)).map(lambda pair: (min(pair), pair[1])), max_size=5
    ),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 9),
    head_dim=st.integers(1, 16).map(lambda vectors: 16 * vectors),
    block_size=st.sampled_from([16, 48, 112, 256]),
    dtype=st.sampled_from([BF16, FP32, INT8]),
    window=st.sampled_from([0, 0, 3, 100, 300]),
    seed=st.integers(0, 100),
)
def test_random_steps_are_the_reference(
    sequences, kv_heads, group, head_dim, block_size, dtype, window, seed
):
    case = make_case(
        sequences,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        seed=seed,
    )
    if len(case.q):
        check(case, ISAS[-1], window)
    else:
        attend(case, ISAS[-1], window=window)


@pytest.mark.parametrize("isa", ISAS)
def test_strided_and_misaligned_tensors(isa):
    """Queries as columns of a wider matrix, the caches as one layer of blocks that hold two."""
    case = make_case(MIX, heads=4, kv_heads=2, head_dim=64)
    expected = attend(case, isa)
    wide = torch.full((len(case.q), 4 * 64 + 7), float("nan"))
    wide[:, 3:259] = case.q.flatten(1)
    layered = dataclasses.replace(
        case,
        q=wide[:, 3:259].unflatten(1, (4, 64)),
        k_cache=torch.stack([torch.zeros_like(case.k_cache), case.k_cache], 1)[:, 1],
        v_cache=torch.stack([torch.zeros_like(case.v_cache), case.v_cache], 1)[:, 1],
    )
    assert not layered.k_cache.is_contiguous()
    assert_same_bits(attend(layered, isa), expected)


# --- extreme scores -----------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("isa", ISAS)
def test_a_query_that_is_not_a_number_spoils_its_own_rows_only(isa, softcap):
    """And does spoil them: a plausible answer from a broken model would be worse."""
    case = make_case([(3, 300), (1, 40)], heads=4, kv_heads=2, head_dim=64)
    healthy = attend(case, isa, softcap=softcap)
    case.q[1, 2, 5] = float("nan")
    out = attend(case, isa, softcap=softcap)
    assert out[1, 2].isnan().all()
    out[1, 2] = healthy[1, 2]
    assert_same_bits(out, healthy)


@pytest.mark.parametrize("winner", [0, 100, 255, 256, 599])
@pytest.mark.parametrize("isa", ISAS)
def test_a_score_far_above_the_others_gives_its_value_exactly(isa, winner):
    case = make_case([(1, 600)], heads=2, kv_heads=1, head_dim=64, dtype=FP32)
    block, offset = int(case.plan.block_tables[0, winner // 16]), winner % 16
    case.q.fill_(1.0)
    case.k_cache.copy_(torch.nan_to_num(case.k_cache).clamp(-1, 1))
    case.k_cache[block, 0, :, offset] = 1e6
    assert_same_bits(attend(case, isa)[0], case.v_cache[block, 0, offset].expand(2, 64))


@pytest.mark.parametrize("isa", ISAS)
def test_equal_scores_of_any_size_give_the_mean(isa):
    case = make_case([(1, 600)], heads=1, kv_heads=1, head_dim=64, dtype=FP32)
    values = torch.cat([case.v_cache[i, 0] for i in case.plan.block_tables[0, :-1].tolist()])[:600]
    for key in (0.0, 1e30, -1e30):
        case.k_cache.fill_(key)
        case.q.fill_(1.0)
        expected = values.double().mean(0)
        assert_close(attend(case, isa)[0, 0], expected, values.double().abs().mean(0) * 300 * EPSILON)
