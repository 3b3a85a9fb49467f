"""A row of paged_attention has the same bits in any batch and chunk, with any blocks and threads."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.ops.paged_attention import paged_attention
from helpers.attention import BF16, FP32, INT8, AttentionCase, attend, both_ways, check, make_case
from helpers.compare import assert_same_bits
from helpers.native import FMA_ISAS, ISAS, context

WHOLE = [(1, 1), (15, 15), (16, 16), (17, 17), (255, 255), (257, 257), (600, 600)]


CASES = [
    (BF16, 0, 0.0, False),
    (FP32, 64, 20.0, False),
    (BF16, 300, 0.0, False),
    (INT8, 0, 0.0, False),
    (BF16, 0, 0.0, True),
    (BF16, 301, 20.0, True),
]


@pytest.fixture(scope="module", params=CASES, ids=str)
def promise(request):
    """A step, its options and its result, to be had again in every other way."""
    dtype, window, softcap, rounds = request.param
    options = {"window": window, "softcap": softcap, "rounds": rounds}
    case = make_case(
        [(300, 300), (1, 513), (150, 700), (1, 31)], heads=6, kv_heads=2, head_dim=80, dtype=dtype
    )
    return case, options, attend(case, FMA_ISAS[-1], **options)


def test_bits_alone_and_in_chunks(promise):
    case, options, expected = promise
    for sequence, (begin, end) in enumerate(case.plan.cu_seqlens_q.unfold(0, 2, 1).tolist()):
        for size in (1, 16, 100, 1000):
            for first in range(0, end - begin, size):
                last = min(first + size, end - begin)
                out = attend(case.rows(sequence, first, last), FMA_ISAS[-1], **options)
                assert_same_bits(out, expected[begin + first : begin + last])


def test_bits_on_any_number_of_threads_and_instruction_set(promise):
    case, options, expected = promise
    for isa in FMA_ISAS:
        for num_threads in (1, 3):
            assert_same_bits(attend(case, isa, num_threads, **options), expected)


@pytest.mark.parametrize("block_size", [32, 48, 256])
def test_bits_with_other_blocks(promise, block_size):
    case, options, expected = promise
    sequences = [(300, 300), (1, 513), (150, 700), (1, 31)]
    dtype = case.k_cache.dtype
    moved = make_case(sequences, heads=6, kv_heads=2, head_dim=80, dtype=dtype, block_size=block_size)
    assert_same_bits(attend(moved, FMA_ISAS[-1], **options), expected)


def test_bits_with_fewer_heads(promise):
    """A KV head's group alone gives what it gives among the others."""
    case, options, expected = promise
    k_cache, v_cache = case.k_cache[:, 1:].contiguous(), case.v_cache[:, 1:].contiguous()
    scales = None if case.kv_scales is None else case.kv_scales[:, 1:].contiguous()
    q = case.q[:, 3:].contiguous()
    part = dataclasses.replace(case, q=q, k_cache=k_cache, v_cache=v_cache, kv_scales=scales)
    assert_same_bits(attend(part, FMA_ISAS[-1], **options), expected[:, 3:])


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("token", [270, 271])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("isa", ISAS)
def test_no_row_reads_a_token_that_it_does_not_see(isa, dtype, token, poison):
    """A token is poisoned: rows before it and rows whose window left it behind do not change."""
    options = {"window": 50, "rounds": dtype == BF16}
    case = make_case([(400, 400)], heads=3, kv_heads=1, head_dim=64, dtype=dtype)
    expected = attend(case, isa, **options)
    block, offset = int(case.plan.block_tables[0, token // 16]), token % 16
    case.k_cache[block, :, :, offset] = poison
    case.v_cache[block, :, offset] = poison
    actual = attend(case, isa, **options)
    end = token + 50
    assert_same_bits(actual[:token], expected[:token])
    assert_same_bits(actual[end:], expected[end:])
    assert (actual[token:end] != expected[token:end]).any(-1).all()


# --- rows that share blocks, and walks cut for threads --------------------------------------------


def share_blocks(case: AttentionCase, sharing: list[tuple[int, int, int]]) -> AttentionCase:
    """`sharing` are (sequence, whose blocks it gets, how many of them)."""
    for sequence, other, num_blocks in sharing:
        case.plan.block_tables[sequence, :num_blocks] = case.plan.block_tables[other, :num_blocks]
    return case


def assert_bits_of_each_alone(case: AttentionCase, num_threads: int, **options) -> None:
    together = attend(case, FMA_ISAS[-1], num_threads, **options)
    for sequence, (begin, end) in enumerate(case.plan.cu_seqlens_q.unfold(0, 2, 1).tolist()):
        if begin < end:
            alone = attend(case.rows(sequence, 0, end - begin), FMA_ISAS[-1], 1, **options)
            assert_same_bits(alone, together[begin:end])


# Sequences 0, 2 and 4 share a prefix, 2 and 4 a longer one; 5 shares less than a split, 3 nothing; 6 has
# rows enough for tiles of its own; and the blocks of 7 are all also those of 0.
SHARING = [(1, 1400), (0, 600), (2, 1300), (1, 700), (1, 1290), (3, 800), (40, 900), (1, 512)]
SHARED = [(2, 0, 40), (4, 2, 75), (5, 0, 10), (6, 0, 40), (7, 0, 32)]


@pytest.mark.parametrize("dtype", [BF16, INT8])
@pytest.mark.parametrize("isa", ISAS)
def test_rows_that_share_blocks_are_the_reference(isa, dtype):
    case = make_case(SHARING, heads=6, kv_heads=2, head_dim=64, dtype=dtype)
    check(share_blocks(case, SHARED), isa)


@pytest.mark.parametrize("window", [0, 300, 900])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_bits_of_rows_that_share_blocks_are_those_of_each_alone(num_threads, window):
    case = share_blocks(make_case(SHARING, heads=6, kv_heads=2, head_dim=64), SHARED)
    for rounds in (False, True):
        assert_bits_of_each_alone(case, num_threads, window=window, rounds=rounds)


@pytest.mark.parametrize("num_threads", [2, 4])
@pytest.mark.parametrize("sequences", [[(1, 2000)], [(7, 1030)], [(11, 800), (1, 3)]])
def test_bits_of_a_walk_that_many_threads_share(sequences, num_threads):
    case = make_case(sequences, heads=4, kv_heads=1, head_dim=32, dtype=FP32)
    sinks = torch.tensor([0.0, 1.0, -2.0, 5.0])
    outs = []
    for count in (1, num_threads):
        out = torch.full(case.q.shape, float("nan"))
        arguments = (case.q, case.k_cache, case.v_cache, case.plan, 0.2, 700, 0.0, out, sinks)
        paged_attention(context(FMA_ISAS[-1], count), *arguments)
        outs.append(out)
    assert_same_bits(outs[1], outs[0])
    assert_bits_of_each_alone(case, num_threads)


@settings(max_examples=30, deadline=None)
@given(
    sequences=st.lists(st.tuples(st.integers(1, 5), st.integers(5, 900)), min_size=2, max_size=7),
    sharing=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 60)), max_size=8),
    group=st.integers(1, 9),
    block_size=st.sampled_from([16, 48, 128]),
    window=st.sampled_from([0, 0, 200, 500]),
    num_threads=st.integers(1, 4),
    rounds=st.booleans(),
)
def test_bits_of_any_sharing(sequences, sharing, group, block_size, window, num_threads, rounds):
    case = make_case(sequences, heads=group, kv_heads=1, head_dim=32, block_size=block_size)
    whole_blocks = [kv_len // block_size for _, kv_len in sequences]
    for sequence, other, num_blocks in sharing:
        if max(sequence, other) < len(sequences):
            count = min(num_blocks, whole_blocks[sequence], whole_blocks[other])
            share_blocks(case, [(sequence, other, count)])
    assert_bits_of_each_alone(case, num_threads, window=window, rounds=rounds)


@pytest.mark.parametrize("window", [0, 64])
def test_seeing_both_ways_bits_do_not_depend_on_the_batch_or_the_instruction_set(window):
    case = both_ways(make_case(WHOLE, heads=2, kv_heads=2, head_dim=32, block_size=16, dtype=FP32))
    whole = attend(case, FMA_ISAS[-1], 3, window)
    ends = case.plan.cu_seqlens_q.tolist()
    for isa in FMA_ISAS:
        for b in range(len(WHOLE)):
            plan = dataclasses.replace(
                case.plan,
                cu_seqlens_q=torch.tensor([0, ends[b + 1] - ends[b]], dtype=torch.int32),
                kv_lens=case.plan.kv_lens[b : b + 1],
                block_tables=case.plan.block_tables[b : b + 1],
            )
            rows = slice(ends[b], ends[b + 1])
            alone = attend(dataclasses.replace(case, q=case.q[rows], plan=plan), isa, 1, window)
            assert_same_bits(alone, whole[rows])
