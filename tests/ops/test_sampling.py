"""ops.sampling against a plain float64 reference, on every instruction set of the machine."""

from __future__ import annotations

import dataclasses
import math
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import _native
from engine.errors import NativeError
from engine.ops import reference_sampling as reference
from engine.ops.reference_sampling import RowParams
from engine.ops.sampling import SamplingTensors, sample

ISAS = _native.available_isas()
FMA_ISAS = [isa for isa in ISAS if isa != "baseline"]


@pytest.fixture(scope="module", params=ISAS)
def ctx(request):
    return _native.ExecutionContext(2, request.param)


def ragged(rows: list[list], dtype) -> tuple[np.ndarray, np.ndarray]:
    indptr = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    return np.array([x for row in rows for x in row], dtype=dtype), indptr


def tensors_for(
    logits: np.ndarray, rows: list[RowParams], num_top: list[int] | None = None
) -> SamplingTensors:
    """Arguments for one batch. Outputs and scratch are filled with values that must not survive."""
    num_rows, vocab = logits.shape
    num_words = (vocab + 31) // 32
    tokens, token_indptr = ragged([[*row.prompt, *row.output] for row in rows], np.int32)
    bias_ids, bias_indptr = ragged([[token for token, _ in row.logit_bias] for row in rows], np.int32)
    bias_values, _ = ragged([[bias for _, bias in row.logit_bias] for row in rows], np.float32)
    bitmask = None
    if any(row.allowed is not None for row in rows):
        bits = np.zeros((num_rows, num_words * 32), dtype=bool)
        for r, row in enumerate(rows):
            bits[r, list(row.allowed) if row.allowed is not None else slice(None)] = True
        bitmask = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
    num_top = num_top or [-1] * num_rows
    max_top = max(0, *num_top) if num_top else 0

    def column(name, dtype):
        return np.array([getattr(row, name) for row in rows], dtype=dtype)

    return SamplingTensors(
        logits=logits.astype(np.float32).copy(),
        workspace=np.full((num_rows, vocab), np.nan, np.float32),
        seen=np.full((num_rows, num_words), -1, np.int32),
        temperature=column("temperature", np.float32),
        top_k=column("top_k", np.int32),
        top_p=column("top_p", np.float32),
        min_p=column("min_p", np.float32),
        repetition_penalty=column("repetition_penalty", np.float32),
        frequency_penalty=column("frequency_penalty", np.float32),
        presence_penalty=column("presence_penalty", np.float32),
        seeds=column("seed", np.int64),
        choices=column("choice", np.int32),
        positions=column("position", np.int64),
        token_ids=tokens,
        token_indptr=token_indptr,
        prompt_lens=np.array([len(row.prompt) for row in rows], np.int32),
        bias_ids=bias_ids,
        bias_values=bias_values,
        bias_indptr=bias_indptr,
        bitmask=bitmask,
        num_top_logprobs=np.array(num_top, np.int32),
        out_ids=np.full(num_rows, -77, np.int32),
        out_logprobs=np.full(num_rows, np.nan, np.float32),
        top_ids=np.full((num_rows, max_top), -77, np.int32),
        top_logprobs=np.full((num_rows, max_top), np.nan, np.float32),
    )


def draw(ctx, logits: np.ndarray, rows: list[RowParams], num_top: list[int] | None = None) -> SamplingTensors:
    tensors = tensors_for(logits, rows, num_top)
    sample(ctx, tensors)
    return tensors


def assert_drawn(token: int, logits: np.ndarray, params: RowParams) -> None:
    """The token must be the reference's, or the threshold must lie on its edge within rounding.

    A filter may cut at a neighbour where a float32 rounding moves its limit: then the token must be
    drawn by a filter that is wider or narrower by a hair.
    """
    if token == reference.sample_row(torch.from_numpy(logits), params):
        return
    hair = 1e-5
    for top_p in (params.top_p * (1 - hair), params.top_p, min(1.0, params.top_p * (1 + hair))):
        for min_p in (params.min_p * (1 - hair), params.min_p, params.min_p * (1 + hair)):
            w = reference.weights(
                torch.from_numpy(logits), dataclasses.replace(params, top_p=top_p, min_p=min_p)
            )
            total = w.cumsum(0)
            threshold = reference.uniform(params.seed, params.choice, params.position) * total[-1]
            low = total[token] - w[token]
            if w[token] > 0 and low - hair * total[-1] <= threshold <= total[token] + hair * total[-1]:
                return
    raise AssertionError(
        f"drew {token}, reference {reference.sample_row(torch.from_numpy(logits), params)} for {params}"
    )


def test_philox_known_answers():
    # Published vectors of the Random123 library.
    assert reference.philox4x32((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ones = 0xFFFFFFFF
    assert reference.philox4x32((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)


@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 31, 33, 1000, 1024, 1025, 5000])
def test_greedy_takes_the_lowest_id_of_the_largest(ctx, vocab):
    rng = np.random.default_rng(vocab)
    logits = rng.integers(-3, 4, size=(5, vocab)).astype(np.float32)  # many ties
    out = draw(ctx, logits, [RowParams(temperature=0.0)] * 5)
    assert out.out_ids.tolist() == logits.argmax(axis=1).tolist()


def random_params(rng: np.random.Generator, vocab: int) -> RowParams:
    def maybe(value, default):
        return value if rng.random() < 0.5 else default

    def single(low, high):
        return float(np.float32(rng.uniform(low, high)))

    tokens = tuple(int(t) for t in rng.integers(0, vocab, size=rng.integers(0, 40)))
    split = int(rng.integers(0, len(tokens) + 1))
    allowed = tuple(sorted({int(t) for t in rng.integers(0, vocab, size=vocab)}))
    return RowParams(
        temperature=maybe(single(0.05, 2.0), 1.0),
        top_k=maybe(int(rng.integers(1, vocab + 5)), -1),
        top_p=maybe(single(0.05, 1.0), 1.0),
        min_p=maybe(single(0.0, 0.5), 0.0),
        repetition_penalty=maybe(single(0.5, 2.0), 1.0),
        frequency_penalty=maybe(single(-2, 2), 0.0),
        presence_penalty=maybe(single(-2, 2), 0.0),
        seed=int(rng.integers(-(2**63), 2**63 - 1)),
        choice=int(rng.integers(0, 8)),
        position=int(rng.integers(0, 2**33)),
        prompt=tokens[:split],
        output=tokens[split:],
        logit_bias=maybe(
            tuple((int(rng.integers(0, vocab)), float(rng.integers(-5, 6))) for _ in range(3)), ()
        ),
        allowed=maybe(allowed, None),
    )


@pytest.mark.parametrize("vocab", [1, 7, 16, 100, 1030, 4099])
def test_draws_match_the_reference(ctx, vocab):
    rng = np.random.default_rng(vocab)
    rows = [random_params(rng, vocab) for _ in range(60)]
    logits = (rng.standard_normal((60, vocab)) * rng.uniform(0.5, 6, size=(60, 1))).astype(np.float32)
    out = draw(ctx, logits, rows)
    for r, params in enumerate(rows):
        assert_drawn(int(out.out_ids[r]), logits[r], params)


@pytest.mark.parametrize(
    "params",
    [
        RowParams(),
        RowParams(temperature=0.6),
        RowParams(top_k=5),
        RowParams(top_p=0.7),
        RowParams(min_p=0.2),
        RowParams(top_k=12, top_p=0.8, min_p=0.05, temperature=1.5),
    ],
)
def test_frequencies_match_the_distribution(ctx, params):
    num_draws, vocab = 20_000, 24
    logits = np.random.default_rng(3).standard_normal(vocab).astype(np.float32) * 2
    rows = [dataclasses.replace(params, seed=5, position=i) for i in range(num_draws)]
    counts = np.bincount(draw(ctx, np.tile(logits, (num_draws, 1)), rows).out_ids, minlength=vocab)
    w = reference.weights(torch.from_numpy(logits), params).numpy()
    expected = w / w.sum() * num_draws
    assert counts[w == 0].sum() == 0
    kept = w > 0
    chi2 = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    # Mean k - 1 and variance 2(k - 1): five standard deviations. The draws are fixed by the seed.
    freedom = max(kept.sum() - 1, 1)
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom)


def shaped_logits(rng: np.random.Generator, vocab: int) -> np.ndarray:
    """Rows whose largest values lie side by side, far apart, are equal, or stand out by nothing."""
    flat = rng.standard_normal(vocab) * 1e-3
    one_block, spread, tied = flat.copy(), flat.copy(), flat.copy()
    one_block[64:96] += np.linspace(9, 10, 32)
    spread[:: vocab // 40] += np.linspace(5, 12, len(spread[:: vocab // 40]))
    tied[rng.integers(0, vocab, size=300)] = 4.0
    alone = np.full(vocab, -np.inf)
    alone[vocab - 1] = -3.0
    return np.stack([flat, one_block, spread, tied, alone]).astype(np.float32)


@pytest.mark.parametrize(
    "params",
    [
        RowParams(top_k=1),
        RowParams(top_k=20),
        RowParams(top_k=33),
        RowParams(top_k=900),
        RowParams(top_p=0.1),
        RowParams(top_p=0.9),
        RowParams(top_p=0.999),
        RowParams(top_k=40, top_p=0.8),
    ],
)
def test_filters_of_a_large_vocabulary(ctx, params):
    """Blocks of tokens that cannot matter are passed over: those that matter must not be."""
    rng = np.random.default_rng(11)
    logits = np.repeat(shaped_logits(rng, 20_011), 12, axis=0)
    rows = [dataclasses.replace(params, seed=seed) for seed in range(len(logits))]
    out = draw(ctx, logits, rows)
    for r, row in enumerate(rows):
        assert_drawn(int(out.out_ids[r]), logits[r], row)


def test_seeds_choices_and_positions_all_matter(ctx):
    logits = np.zeros((1, 4096), np.float32)
    base = RowParams(seed=1)
    others = [dataclasses.replace(base, **change) for change in ({"seed": 2}, {"choice": 1}, {"position": 1})]
    tokens = {int(draw(ctx, logits, [row]).out_ids[0]) for row in (base, *others)}
    assert len(tokens) == 4


def test_log_probabilities_are_of_the_raw_logits(ctx):
    rng = np.random.default_rng(0)
    vocab, num_rows = 3001, 6
    logits = (rng.standard_normal((num_rows, vocab)) * 4).astype(np.float32)
    params = RowParams(
        temperature=0.3, top_k=3, repetition_penalty=1.5, output=(1, 2), logit_bias=((5, 50.0),)
    )
    rows = [dataclasses.replace(params, seed=r) for r in range(num_rows)]
    num_top = [-1, 0, 1, 5, 20, 3]
    out = draw(ctx, logits, rows, num_top)
    assert math.isnan(out.out_logprobs[0])
    for r in range(1, num_rows):
        expected = reference.log_softmax(torch.from_numpy(logits[r]))
        order = np.lexsort((np.arange(vocab), -logits[r]))[: num_top[r]]
        # float32 results of magnitude about 10, from exponentials good to a few ulp
        np.testing.assert_allclose(out.out_logprobs[r], expected[int(out.out_ids[r])], rtol=0, atol=4e-6)
        assert out.top_ids[r, : num_top[r]].tolist() == order.tolist()
        np.testing.assert_allclose(out.top_logprobs[r, : num_top[r]], expected[order], rtol=0, atol=4e-6)
        assert np.all(out.top_ids[r, num_top[r] :] == -77), "entries that nobody asked for stay untouched"


def test_top_log_probabilities_with_ties_take_lower_ids(ctx):
    logits = np.zeros((1, 100), np.float32)
    logits[0, 60] = 1
    out = draw(ctx, logits, [RowParams(temperature=0.0)], [5])
    assert out.top_ids[0].tolist() == [60, 0, 1, 2, 3]


def test_everything_ruled_out_gives_minus_one(ctx):
    logits = np.zeros((3, 40), np.float32)
    logits[1] = -np.inf
    logits[2] = np.nan
    rows = [RowParams(allowed=()), RowParams(), RowParams(temperature=0.0)]
    assert draw(ctx, logits, rows, [2, 2, 2]).out_ids.tolist() == [-1, -1, -1]


def test_broken_logits_do_not_win(ctx):
    logits = np.zeros((2, 40), np.float32)
    logits[0, 3] = np.nan
    logits[0, 9] = 1
    logits[1, 4] = np.inf
    rows = [RowParams(temperature=0.0), RowParams(temperature=1.0)]
    assert draw(ctx, logits, rows).out_ids.tolist() == [9, 4]


def test_a_penalty_below_one_does_not_overflow(ctx):
    logits = np.zeros((2, 40), np.float32)
    logits[:, 7] = 3e38
    rows = [RowParams(repetition_penalty=0.5, output=(7,), min_p=min_p) for min_p in (0.0, 0.5)]
    assert draw(ctx, logits, rows).out_ids.tolist() == [7, 7]


@pytest.mark.parametrize("params", [RowParams(temperature=0.0), RowParams(top_k=1)])
def test_zeros_of_either_sign_tie(ctx, params):
    logits = np.array([[-1.0, -0.0, 0.0, -0.0]], np.float32)
    assert draw(ctx, logits, [params]).out_ids.tolist() == [1]


@pytest.mark.parametrize(("bias", "token"), [(100.0, 6), (-100.0, 5)])
def test_the_largest_biases_decide(ctx, bias, token):
    logits = np.full((50, 10), -200.0, np.float32)
    logits[:, 5:7] = 20.0
    rows = [RowParams(temperature=2.0, logit_bias=((6, bias),), seed=-i) for i in range(50)]
    assert set(draw(ctx, logits, rows).out_ids.tolist()) == {token}


def test_a_bitmask_is_held_during_the_call(ctx):
    made = []

    class Producer:
        def __init__(self, produce):
            self._produce = produce

        def __dlpack__(self, **kwargs):
            return self._produce(**kwargs)

    def produce_mask(**kwargs):
        mask = np.array([[1 << 3]], np.int32)
        made.append(weakref.ref(mask))
        return mask.__dlpack__(**kwargs)

    tensors = tensors_for(np.zeros((1, 10), np.float32), [RowParams()])
    out_ids = tensors.out_ids

    def produce_out(**kwargs):
        assert made[0]() is not None, "freed while the arguments are still being read"
        return out_ids.__dlpack__(**kwargs)

    tensors.bitmask, tensors.out_ids = Producer(produce_mask), Producer(produce_out)
    sample(ctx, tensors)
    assert out_ids.tolist() == [3]
    assert made[0]() is None, "kept after the call"


def test_a_bias_of_minus_infinity_rules_out(ctx):
    logits = np.zeros((200, 3), np.float32)
    rows = [RowParams(logit_bias=((1, -math.inf),), seed=i) for i in range(200)]
    assert set(draw(ctx, logits, rows).out_ids.tolist()) == {0, 2}


def test_rows_do_not_depend_on_their_batch(ctx):
    rng = np.random.default_rng(11)
    vocab = 2050
    rows = [random_params(rng, vocab) for _ in range(24)]
    logits = (rng.standard_normal((24, vocab)) * 3).astype(np.float32)
    together = draw(ctx, logits, rows, [4] * 24)
    one_thread = draw(_native.ExecutionContext(1, ctx.isa), logits, rows, [4] * 24)
    for r in range(24):
        alone = draw(ctx, logits[r : r + 1], [rows[r]], [4])
        for other in (together, one_thread):
            assert alone.out_ids[0] == other.out_ids[r]
            assert alone.out_logprobs[0].tobytes() == other.out_logprobs[r].tobytes()
            assert alone.top_logprobs[0].tobytes() == other.top_logprobs[r].tobytes()


@pytest.mark.skipif(len(FMA_ISAS) < 2, reason="needs a CPU with two instruction sets with FMA")
def test_sets_with_fma_give_the_same_bits():
    rng = np.random.default_rng(12)
    vocab = 5003
    rows = [random_params(rng, vocab) for _ in range(40)]
    logits = (rng.standard_normal((40, vocab)) * 3).astype(np.float32)
    first, *others = (draw(_native.ExecutionContext(1, isa), logits, rows, [6] * 40) for isa in FMA_ISAS)
    for other in others:
        assert first.out_ids.tolist() == other.out_ids.tolist()
        assert first.out_logprobs.tobytes() == other.out_logprobs.tobytes()
        assert first.top_logprobs.tobytes() == other.top_logprobs.tobytes()


@settings(max_examples=150, deadline=None)
@given(
    logits=st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 3.0, -math.inf]), min_size=1, max_size=40),
    top_k=st.integers(-1, 45),
    top_p=st.sampled_from([1.0, 0.999, 0.5, 0.1, 1e-6]),
    seed=st.integers(0, 50),
)
def test_filters_with_many_ties(logits, top_k, top_p, seed):
    params = RowParams(top_k=top_k, top_p=top_p, seed=seed)
    row = np.array([logits], np.float32)
    token = int(draw(_native.ExecutionContext(1), row, [params]).out_ids[0])
    if np.all(np.isneginf(row)):
        assert token == -1
    else:
        assert_drawn(token, row[0], params)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", np.zeros(3, np.float32), "temperature: expected"),
        ("top_k", np.zeros(2, np.float32), "top_k: expected int32, got float32"),
        ("token_ids", np.array([10], np.int32), "token_indptr: expected 1 last"),
        ("token_indptr", np.array([0, 1, 0], np.int64), "token_indptr: expected rising"),
        ("bias_indptr", np.array([1, 0, 0], np.int64), "bias_indptr: expected 0 first"),
        ("num_top_logprobs", np.array([1, 0], np.int32), "num_top_logprobs: expected at most K=0"),
        ("prompt_lens", np.array([-1, 0], np.int32), "prompt_lens"),
        ("seen", np.zeros((2, 9), np.int32), "seen: expected"),
        ("bitmask", np.zeros((2, 0), np.int32), "bitmask: expected"),
        ("bitmask", np.zeros((1, 1), np.int32), "bitmask: expected"),
        ("bitmask", np.zeros((2, 1), np.int64), "bitmask: expected int32, got int64"),
    ],
)
def test_wrong_arguments_are_named(ctx, field, value, message):
    tensors = tensors_for(np.zeros((2, 10), np.float32), [RowParams()] * 2)
    setattr(tensors, field, value)
    with pytest.raises(NativeError, match=message):
        sample(ctx, tensors)


@pytest.mark.parametrize("token", [-1, 10, 2**31 - 1])
@pytest.mark.parametrize("name", ["token", "bias"])
def test_ids_outside_the_vocabulary_are_refused(ctx, name, token):
    tensors = tensors_for(np.zeros((1, 10), np.float32), [RowParams()])
    setattr(tensors, f"{name}_ids", np.array([token], np.int32))
    setattr(tensors, f"{name}_indptr", np.array([0, 1], np.int64))
    tensors.bias_values = np.zeros(len(tensors.bias_ids), np.float32)
    with pytest.raises(NativeError, match=rf"{name}_ids: expected ids in \[0, 10\)"):
        sample(ctx, tensors)


def test_more_alternatives_than_tokens_are_refused(ctx):
    tensors = tensors_for(np.zeros((1, 3), np.float32), [RowParams()], [4])
    with pytest.raises(NativeError, match="num_top_logprobs: expected at most K=4 and V=3, got 4"):
        sample(ctx, tensors)


def test_a_vocabulary_without_tokens_is_refused(ctx):
    with pytest.raises(NativeError, match="logits: expected at least one token"):
        draw(ctx, np.zeros((2, 0), np.float32), [RowParams()] * 2)


def test_no_rows(ctx):
    assert draw(ctx, np.zeros((0, 10), np.float32), [], []).out_ids.tolist() == []
