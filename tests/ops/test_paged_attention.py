"""paged_attention against its reference, and its promise that a row's bits depend on nothing else."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import NativeError
from engine.ops import reference
from engine.ops.paged_attention import paged_attention
from helpers.attention import AttentionCase, make_case
from helpers.compare import EPSILON, GuardedOutput, assert_close, assert_same_bits
from helpers.native import FMA_ISAS, ISAS, context

# (query rows, cached tokens): whole prompts, decodes, and chunks after a cached prefix.
MIX = [(1, 1), (15, 15), (1, 16), (17, 17), (3, 255), (1, 256), (2, 257), (9, 600), (0, 40)]
BF16, FP32, INT8 = torch.bfloat16, torch.float32, torch.int8


def attend(
    case: AttentionCase, isa: str, num_threads: int = 2, window: int = 0, softcap: float = 0.0
) -> torch.Tensor:
    out = torch.full(case.q.shape, float("nan"))
    scale = case.q.shape[2] ** -0.5
    caches, numbers = (case.k_cache, case.v_cache), (scale, window, softcap)
    paged_attention(
        context(isa, num_threads), case.q, *caches, case.plan, *numbers, out, None, case.kv_scales
    )
    return out


def bound(case: AttentionCase, out_magnitude: torch.Tensor, softcap: float) -> torch.Tensor:
    """Error of the weights times sum(weight |value|), plus that of summing.

    A score of D products has an absolute error of at most 2 (D + 2) roundings of |q| |k| scale, the
    product unfused, and one more with a key's scale; a value's scale costs a weight one. A cap adds six
    roundings of its size. The exponent's subtractions, within a split and between splits, are of numbers
    no larger than that. A weight is off by the errors of its own score and, through the normalisation, by
    those of the others.
    """
    keys = case.k_cache.double()
    if case.kv_scales is not None:
        keys = keys * case.kv_scales[:, :, 0, None, :].double()
    keys = torch.nan_to_num(keys).norm(dim=2).amax()  # |q| |k| by Cauchy and Schwarz
    magnitude = case.q.double().norm(dim=2).amax() * keys * case.q.shape[2] ** -0.5
    score = (2 * (case.q.shape[2] + 2) + 1) * magnitude + 6 * softcap + 4 * 2 * magnitude
    num_splits = case.plan.kv_lens.max() / 256 + 1
    summing = 2 * (2 * 256 + 16 + 6 * num_splits) + 1
    return out_magnitude * (2 * score + summing) * EPSILON * 1.01 + 1e-30


def check(
    case: AttentionCase,
    isa: str,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> None:
    num_rows, heads, head_dim = case.q.shape
    scale = head_dim**-0.5
    out = GuardedOutput(num_rows, heads * head_dim)
    rows = out.tensor.unflatten(1, (heads, head_dim))
    caches = case.k_cache, case.v_cache
    paged_attention(
        context(isa), case.q, *caches, case.plan, scale, window, softcap, rows, sinks, case.kv_scales
    )
    expected, magnitude = torch.empty(2, num_rows, heads, head_dim, dtype=torch.float64)
    arguments = (case.plan, scale, window, softcap)
    reference.paged_attention(
        None, case.q, case.k_cache, case.v_cache, *arguments, expected, sinks, case.kv_scales
    )
    reference.paged_attention(
        None, case.q, case.k_cache, case.v_cache.abs(), *arguments, magnitude, sinks, case.kv_scales
    )
    assert_close(rows, expected, bound(case, magnitude, softcap))
    out.assert_untouched_outside()


@pytest.mark.parametrize("head_dim", range(64, 257, 16))
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


def both_ways(case: AttentionCase) -> AttentionCase:
    return dataclasses.replace(case, plan=dataclasses.replace(case.plan, is_causal=False))


WHOLE = [(1, 1), (15, 15), (16, 16), (17, 17), (255, 255), (257, 257), (600, 600)]


@pytest.mark.parametrize("window", [0, 1, 5, 64, 256, 257, 10**12])
@pytest.mark.parametrize("isa", ISAS)
def test_seeing_both_ways_is_the_reference(isa, window):
    for head_dim in (16, 32, 64):
        case = make_case(WHOLE, heads=2, kv_heads=2, head_dim=head_dim, block_size=16, dtype=FP32)
        check(both_ways(case), isa, window)
    check(both_ways(make_case(MIX, heads=3, kv_heads=1, head_dim=32, block_size=48)), isa, window)


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


# --- a row's bits depend on nothing else --------------------------------------------------------


@pytest.fixture(
    scope="module", params=[(BF16, 0, 0.0), (FP32, 64, 20.0), (BF16, 300, 0.0), (INT8, 0, 0.0)], ids=str
)
def promise(request):
    """A step, its options and its result, to be had again in every other way."""
    dtype, window, softcap = request.param
    options = {"window": window, "softcap": softcap}
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
@pytest.mark.parametrize("isa", ISAS)
def test_no_row_reads_a_token_that_it_does_not_see(isa, poison):
    """Token 270 is poisoned: rows before it and rows whose window left it behind do not change."""
    case = make_case([(400, 400)], heads=3, kv_heads=1, head_dim=64, dtype=FP32)
    expected = attend(case, isa, window=50)
    block, offset = int(case.plan.block_tables[0, 270 // 16]), 270 % 16
    case.k_cache[block, :, :, offset] = poison
    case.v_cache[block, :, offset] = poison
    actual = attend(case, isa, window=50)
    assert_same_bits(actual[:270], expected[:270])
    assert_same_bits(actual[320:], expected[320:])
    assert (actual[270:320] != expected[270:320]).any(-1).all()


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
    assert_bits_of_each_alone(case, num_threads, window=window)


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
)
def test_bits_of_any_sharing(sequences, sharing, group, block_size, window, num_threads):
    case = make_case(sequences, heads=group, kv_heads=1, head_dim=32, block_size=block_size)
    whole_blocks = [kv_len // block_size for _, kv_len in sequences]
    for sequence, other, num_blocks in sharing:
        if max(sequence, other) < len(sequences):
            count = min(num_blocks, whole_blocks[sequence], whole_blocks[other])
            share_blocks(case, [(sequence, other, count)])
    assert_bits_of_each_alone(case, num_threads, window=window)


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


# --- arguments ----------------------------------------------------------------------------------


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
