"""Sampling on the CUDA backend, run by the emulator, against the float64 reference and the CPU's kernels."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import _native
from engine.errors import NativeError
from engine.ops import reference_sampling as reference
from engine.ops import sampling as cpu
from engine.ops.cuda.sampling import sample, score_tokens
from engine.ops.reference_sampling import RowParams
from helpers.cuda_host import emulated_ops
from ops.test_sampling import assert_drawn, random_params, tensors_for
from ops.test_sampling_scores import ATOL, MODES, assert_scores

CHUNK = 8192
"""Tokens that one block looks at."""
LIST = 4096
"""Tokens at a filter's edge that are listed; more make a block read the row again."""


@pytest.fixture(autouse=True, scope="module")
def ops():
    with emulated_ops() as module:
        yield module


def draw(logits: np.ndarray, rows: list[RowParams], num_top: list[int] | None = None, **modes):
    tensors = tensors_for(logits, rows, num_top)
    for name, value in modes.items():
        setattr(tensors, name, value)
    sample(None, tensors)
    return tensors


def tokens(logits: np.ndarray, rows: list[RowParams]) -> list[int]:
    return draw(logits, rows).out_ids.tolist()


@pytest.mark.parametrize("vocab", [1, 2, 3, 31, 33, 1025, CHUNK - 1, CHUNK, CHUNK + 1])
def test_greedy_takes_the_lowest_id_of_the_largest(vocab):
    rng = np.random.default_rng(vocab)
    logits = rng.integers(-3, 4, size=(3, vocab)).astype(np.float32)
    assert tokens(logits, [RowParams(temperature=0.0)] * 3) == logits.argmax(axis=1).tolist()


@pytest.mark.parametrize("is_backwards", [False, True])
@pytest.mark.parametrize(
    ("vocab", "num_rows"), [(1, 10), (7, 30), (100, 40), (1030, 30), (2 * CHUNK + 77, 14)]
)
def test_draws_match_the_reference_and_the_cpu(ops, vocab, num_rows, is_backwards):
    """Every setting at random. In either order of threads: what lacks a barrier would differ."""
    rng = np.random.default_rng(vocab)
    rows = [random_params(rng, vocab) for _ in range(num_rows)]
    logits = (rng.standard_normal((num_rows, vocab)) * rng.uniform(0.5, 6, size=(num_rows, 1))).astype(
        np.float32
    )
    ops.run_backwards(is_backwards)
    try:
        found = tokens(logits, rows)
    finally:
        ops.run_backwards(False)
    on_cpu = tensors_for(logits, rows)
    cpu.sample(_native.ExecutionContext(1), on_cpu)
    for r, params in enumerate(rows):
        assert_drawn(found[r], logits[r], params)
    # A draw that lies on an edge is allowed to differ, and none of these does.
    assert found == on_cpu.out_ids.tolist()


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_rows_may_start_anywhere(offset):
    rng = np.random.default_rng(offset)
    vocab = CHUNK + 1003
    memory = (rng.standard_normal((3, vocab + offset)) * 4).astype(np.float32)
    rows = [RowParams(top_p=0.8, seed=r) for r in range(2)] + [RowParams(temperature=0.0)]
    tensors = tensors_for(memory[:, offset:], rows, [3, 3, 3])
    tensors.logits = memory[:, offset:]
    aligned = draw(memory[:, offset:], rows, [3, 3, 3])
    sample(None, tensors)
    assert tensors.out_ids.tolist() == aligned.out_ids.tolist()
    assert tensors.top_ids.tolist() == aligned.top_ids.tolist()


@pytest.mark.parametrize(
    "params",
    [
        RowParams(),
        RowParams(top_k=1),
        RowParams(top_k=3000),
        RowParams(top_p=1e-6),
        RowParams(top_p=0.5),
        RowParams(top_p=0.99999994),
        RowParams(top_k=20, top_p=0.5),
        RowParams(top_k=CHUNK, top_p=0.999, min_p=0.5),
    ],
)
def test_logits_that_are_all_alike(params):
    """No bin is smaller than another: the row is read again, and ids decide."""
    vocab = CHUNK + 904
    rows = [dataclasses.replace(params, seed=seed) for seed in range(3)]
    for token, row in zip(tokens(np.full((3, vocab), 0.25, np.float32), rows), rows, strict=True):
        assert_drawn(token, np.full(vocab, 0.25, np.float32), row)


@pytest.mark.parametrize("num_alike", [1024, 1025, LIST, LIST + 1])
def test_the_edge_of_the_list_of_candidates(num_alike):
    rng = np.random.default_rng(num_alike)
    logits = rng.uniform(-9, -5, size=(4, CHUNK + 100)).astype(np.float32)
    for row in logits:
        row[rng.choice(len(row), num_alike, replace=False)] = 0
    rows = [
        RowParams(top_k=num_alike - 1),
        RowParams(top_k=num_alike),
        RowParams(top_p=0.3),
        RowParams(top_p=0.9),
    ]
    rows = [dataclasses.replace(row, seed=r) for r, row in enumerate(rows)]
    for r, token in enumerate(tokens(logits, rows)):
        assert_drawn(token, logits[r], rows[r])


def test_filters_cut_at_exactly_one_token():
    """Every token that a filter leaves is drawn at times, and none that it drops."""
    num_draws = 400
    logits = np.repeat(np.array([[3.0, 1.0, 1.0, 1.0, 0.0]], np.float32), 10, axis=1)
    for params, kept in (
        (RowParams(top_k=12, temperature=50.0), {*range(10), 10, 11}),
        (RowParams(min_p=0.95, temperature=50.0), set(range(40))),
        (RowParams(top_k=30, top_p=0.5, temperature=50.0), None),
    ):
        rows = [dataclasses.replace(params, seed=9, position=i) for i in range(num_draws)]
        found = set(tokens(np.tile(logits, (num_draws, 1)), rows))
        w = reference.weights(torch.from_numpy(logits[0]), params)
        assert found == set(w.nonzero().flatten().tolist())
        assert kept is None or found == kept


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.sampled_from([-2.0, -1.0, 0.0, -0.0, 0.5, 3.0, -math.inf]), min_size=1, max_size=40),
    top_k=st.integers(-1, 45),
    top_p=st.sampled_from([1.0, 0.999, 0.5, 0.1, 1e-6, 0.0]),
    min_p=st.sampled_from([0.0, 1e-3, 1.0]),
    seed=st.integers(0, 50),
)
def test_filters_with_many_ties(logits, top_k, top_p, min_p, seed):
    params = RowParams(top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    row = np.array([logits], np.float32)
    (token,) = tokens(row, [params])
    if np.all(np.isneginf(row)):
        assert token == -1
    else:
        assert_drawn(token, row[0], params)


HOSTILE = [
    (np.full(40, -np.inf), RowParams(), -1),
    (np.full(40, np.nan), RowParams(top_p=0.5, top_k=3), -1),
    (np.full(40, np.nan), RowParams(temperature=0.0), -1),
    (np.zeros(40), RowParams(allowed=()), -1),
    (np.zeros(40), RowParams(allowed=(), temperature=0.0), -1),
    (np.zeros(40), RowParams(min_p=1.5), -1),
    (np.where(np.arange(40) == 9, 1, np.where(np.arange(40) == 3, np.nan, 0)), RowParams(temperature=0.0), 9),
    (np.where(np.arange(40) == 4, np.inf, 0), RowParams(top_p=0.9), 4),
    (np.where(np.arange(40) == 4, np.inf, -np.inf), RowParams(top_k=7), 4),
    (np.where(np.arange(40) == 4, 3e38, -3e38), RowParams(temperature=2.0, top_p=0.99), 4),
    (np.where(np.arange(40) == 7, 3e38, 0), RowParams(repetition_penalty=0.5, output=(7,), min_p=0.5), 7),
    (np.where(np.arange(40) < 2, 1.0, 0), RowParams(logit_bias=((0, -math.inf), (2, math.inf))), 2),
    (np.where(np.arange(40) < 2, 1.0, 0), RowParams(logit_bias=((2, math.inf),), allowed=(1,)), 1),
    (np.array([-1.0, -0.0, 0.0]), RowParams(temperature=0.0), 1),
    (np.array([-1.0, -0.0, 0.0]), RowParams(top_k=1), 1),
    (np.arange(40.0), RowParams(temperature=1e-6, top_k=39), 39),
]


@pytest.mark.parametrize(("logits", "params", "token"), HOSTILE)
def test_broken_logits_and_settings(logits, params, token):
    out = draw(logits[None].astype(np.float32), [params], [2])
    assert out.out_ids.tolist() == [token]
    assert token < 0 or not np.isnan(out.out_logprobs).any()


def test_a_bias_that_comes_twice_is_added_twice():
    logits = np.zeros((1, 3 * CHUNK), np.float32)
    far = 2 * CHUNK + 256
    row = RowParams(temperature=0.0, logit_bias=((5, 3.0), (far, 2.0), (far, 2.0), (far + 256, 1.0)))
    assert tokens(logits, [row]) == [far]


def test_penalties_count_each_token():
    rng = np.random.default_rng(3)
    known = tuple(int(t) for t in rng.integers(0, 60, 3000))
    row = RowParams(
        temperature=0.0,
        repetition_penalty=1.3,
        frequency_penalty=0.02,
        presence_penalty=-0.7,
        prompt=known[:1500],
        output=known[1500:],
    )
    logits = (rng.standard_normal((1, 70)) * 4).astype(np.float32)
    out = draw(logits, [row], [70], reports_processed=True, reports_logits=True)
    expected = reference.adjusted_logits(torch.from_numpy(logits[0]), row).numpy()
    np.testing.assert_allclose(out.top_logprobs[0], expected[out.top_ids[0]], rtol=1e-6, atol=ATOL)


def test_ids_and_bounds_that_lie_outside_are_passed_over():
    """They cannot be refused without waiting for the device."""
    tensors = tensors_for(
        np.zeros((2, 10), np.float32), [RowParams(temperature=0.0, presence_penalty=1.0)] * 2
    )
    tensors.token_ids = np.array([-1, 10, 2**31 - 1, -(2**31), 0], np.int32)
    tensors.token_indptr = np.array([-5, 5, 99], np.int64)
    tensors.bias_ids = np.array([-1, 10, 1], np.int32)
    tensors.bias_values = np.array([5, 5, 1], np.float32)
    tensors.bias_indptr = np.array([-5, 99, 3], np.int64)
    tensors.num_top_logprobs = np.array([99, 99], np.int32)
    tensors.top_ids, tensors.top_logprobs = np.zeros((2, 1), np.int32), np.zeros((2, 1), np.float32)
    sample(None, tensors)
    assert tensors.out_ids.tolist() == [1, 0]


def test_rows_do_not_depend_on_their_batch():
    rng = np.random.default_rng(11)
    vocab = CHUNK + 901
    rows = [random_params(rng, vocab) for _ in range(8)]
    logits = (rng.standard_normal((8, vocab)) * 3).astype(np.float32)
    together = draw(logits, rows, [4] * 8)
    for r in range(8):
        alone = draw(logits[r : r + 1], [rows[r]], [4])
        assert alone.out_ids[0] == together.out_ids[r]
        assert alone.out_logprobs[0].tobytes() == together.out_logprobs[r].tobytes()
        assert alone.top_logprobs[0].tobytes() == together.top_logprobs[r].tobytes()


def test_scores_do_not_depend_on_where_a_row_starts():
    """One token has nearly all the probability: its logarithm shows the last bits of the sum."""
    vocab = CHUNK + 901  # no row starts where the one before it does
    logits = np.tile(np.random.default_rng(4).standard_normal(vocab).astype(np.float32), (4, 1))
    logits[:, 77] = 12
    out = draw(logits, [RowParams(temperature=0.0)] * 4, [4] * 4)
    assert out.out_ids.tolist() == [77] * 4 and -0.2 < out.out_logprobs[0] < -0.01
    assert len({row.tobytes() for row in out.top_logprobs}) == 1


def test_logits_of_the_model_stay_as_they_are():
    logits = np.array([[1.0, np.nan, np.inf, -np.inf]] * 2, np.float32)
    out = draw(logits, [RowParams(presence_penalty=1.0, output=(0,), allowed=(0, 2)), RowParams()], [4, 4])
    assert out.logits.tobytes() == logits.tobytes()


@pytest.mark.parametrize(("processed", "as_logits"), MODES)
@pytest.mark.parametrize("vocab", [1, 7, 100, CHUNK + 1030])
def test_scores_match_the_reference(vocab, processed, as_logits):
    rng = np.random.default_rng(vocab)
    num_rows = 30 if vocab < CHUNK else 8
    rows = [random_params(rng, vocab) for _ in range(num_rows)]
    rows[::4] = [dataclasses.replace(params, temperature=0.0) for params in rows[::4]]
    logits = (rng.standard_normal((num_rows, vocab)) * rng.uniform(0.5, 6, size=(num_rows, 1))).astype(
        np.float32
    )
    num_top = [min(vocab, r % 23 - 1) for r in range(num_rows)]
    out = draw(logits, rows, num_top, reports_processed=processed, reports_logits=as_logits)
    for r, params in enumerate(rows):
        token, most = int(out.out_ids[r]), num_top[r]
        if most < 0 or token < 0:
            assert math.isnan(out.out_logprobs[r])
            continue
        expected = reference.reported(
            torch.from_numpy(logits[r]), params, processed=processed, as_logits=as_logits
        ).numpy()
        assert_scores(out.out_logprobs[r : r + 1], expected[token : token + 1])
        top = out.top_logprobs[r, :most]
        assert_scores(top, expected[out.top_ids[r, :most]])
        assert_scores(top, -np.sort(-expected)[:most])
        assert len(set(out.top_ids[r, :most].tolist())) == most
        assert np.all(out.top_ids[r, most:] == -77), "entries that nobody asked for stay untouched"


def test_top_scores_with_ties_take_lower_ids():
    logits = np.zeros((1, CHUNK + 50), np.float32)
    logits[0, CHUNK + 20] = 1
    out = draw(logits, [RowParams(temperature=0.0)], [5])
    assert out.top_ids[0].tolist() == [CHUNK + 20, 0, 1, 2, 3]


def score(logits, token_ids, num_top, as_logits=False):
    num_rows, most = len(logits), max(num_top)
    own = np.full(num_rows, np.nan, np.float32)
    ids, top = np.full((num_rows, most), -77, np.int32), np.full((num_rows, most), np.nan, np.float32)
    score_tokens(
        None,
        logits.copy(),
        np.array(token_ids, np.int32),
        np.array(num_top, np.int32),
        own,
        ids,
        top,
        as_logits,
    )
    return own, ids, top


@pytest.mark.parametrize("as_logits", [False, True])
def test_known_tokens_are_scored_as_on_the_cpu(as_logits):
    rng = np.random.default_rng(2)
    logits = (rng.standard_normal((5, CHUNK + 3)) * 4).astype(np.float32)
    logits[1, 100:200], logits[2, 7], logits[3] = np.nan, np.inf, -np.inf
    token_ids, num_top = [0, 150, 7, 3, CHUNK + 2], [0, 5, 2, 5, 3]
    own, ids, top = score(logits, token_ids, num_top, as_logits)
    expected = np.empty(5, np.float32), np.full((5, 5), -77, np.int32), np.full((5, 5), np.nan, np.float32)
    wanted = np.array(token_ids, np.int32), np.array(num_top, np.int32)
    cpu.score_tokens(_native.ExecutionContext(1), logits.copy(), *wanted, *expected, as_logits)
    np.testing.assert_allclose(own, expected[0], rtol=1e-6, atol=ATOL)
    assert ids.tolist() == expected[1].tolist()
    np.testing.assert_allclose(top, expected[2], rtol=1e-6, atol=ATOL)


def test_scores_are_what_sampling_reports():
    rng = np.random.default_rng(5)
    logits = (rng.standard_normal((4, 3001)) * 4).astype(np.float32)
    drawn = draw(logits, [RowParams(seed=r) for r in range(4)], [4] * 4)
    own, ids, top = score(logits, drawn.out_ids.tolist(), [4] * 4)
    assert own.tobytes() == drawn.out_logprobs.tobytes()
    assert ids.tobytes() == drawn.top_ids.tobytes() and top.tobytes() == drawn.top_logprobs.tobytes()


def test_tokens_outside_the_vocabulary_have_no_score():
    own, ids, _ = score(np.zeros((3, 10), np.float32), [-1, 10, 3], [1, 1, 1])
    assert np.isnan(own).tolist() == [True, True, False] and ids[:, 0].tolist() == [-77, -77, 0]


def test_no_rows():
    assert tokens(np.zeros((0, 10), np.float32), []) == []


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", np.zeros(3, np.float32), "temperature: expected"),
        ("top_k", np.zeros(2, np.float32), "top_k: expected int32, got float32"),
        ("logits", np.zeros((2, 0), np.float32), "expected"),
        ("bitmask", np.zeros((2, 0), np.int32), "bitmask: expected"),
        ("seeds", np.zeros(2, np.int32), "seeds: expected int64, got int32"),
    ],
)
def test_wrong_arguments_are_named(field, value, message):
    tensors = tensors_for(np.zeros((2, 10), np.float32), [RowParams()] * 2)
    setattr(tensors, field, value)
    with pytest.raises(NativeError, match=message):
        sample(None, tensors)


def test_too_little_scratch_memory_is_refused(ops):
    tensors = tensors_for(np.zeros((2, 10), np.float32), [RowParams()] * 2)
    arguments = {name: getattr(tensors, name) for name in tensors.__slots__}
    num_bytes = ops.sampling_scratch_bytes(2, 10, 0)
    with pytest.raises(NativeError, match="scratch: expected"):
        ops.sample(np.zeros(num_bytes - 1, np.uint8), **arguments)
    logits = np.empty((1, 2**23 + 1), np.float32)
    one, none = np.zeros(1, np.int32), np.zeros((1, 0), np.int32)
    outputs = one, one, np.zeros(1, np.float32), none, none.view(np.float32)
    with pytest.raises(NativeError, match="logits: expected at most"):
        ops.score_tokens(np.zeros(16, np.uint8), logits, *outputs, False)
