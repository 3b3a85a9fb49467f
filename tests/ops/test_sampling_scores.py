"""What `sample` and `score_tokens` report about tokens: raw or processed, log-probabilities or logits."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from transformers.generation import logits_process

from engine import _native
from engine.ops import reference_sampling as reference
from engine.ops.reference_sampling import RowParams
from engine.ops.sampling import sample, score_tokens
from ops.test_sampling import FMA_ISAS, ISAS, random_params, tensors_for

MODES = list(itertools.product([False, True], [False, True]))
ATOL = 4e-6
"""float32 results of magnitude about 10, from exponentials good to a few ulp."""


@pytest.fixture(scope="module", params=ISAS)
def ctx(request):
    return _native.ExecutionContext(2, request.param)


def draw(ctx, logits, rows, num_top, *, processed, as_logits):
    tensors = tensors_for(logits, rows, num_top)
    tensors.reports_processed, tensors.reports_logits = processed, as_logits
    sample(ctx, tensors)
    return tensors


def assert_scores(found, expected):
    """Equal up to rounding, and impossible in the same places."""
    expected = np.asarray(expected, np.float32)
    assert (np.isneginf(found) == np.isneginf(expected)).all()
    finite = np.isfinite(expected)
    # Scaled by a low temperature, scores are large: a few ulp of them.
    np.testing.assert_allclose(found[finite], expected[finite], rtol=1e-6, atol=ATOL)


@pytest.mark.parametrize(("processed", "as_logits"), MODES)
@pytest.mark.parametrize("vocab", [1, 7, 16, 100, 1030])
def test_every_kind_matches_the_reference(ctx, vocab, processed, as_logits):
    rng = np.random.default_rng(vocab)
    rows = [random_params(rng, vocab) for _ in range(60)]
    rows += [dataclasses.replace(params, temperature=0.0) for params in rows[:20]]
    logits = (rng.standard_normal((80, vocab)) * rng.uniform(0.5, 6, size=(80, 1))).astype(np.float32)
    num_top = [min(vocab, r % 9) for r in range(80)]
    out = draw(ctx, logits, rows, num_top, processed=processed, as_logits=as_logits)
    for r, params in enumerate(rows):
        token = int(out.out_ids[r])
        if token < 0:
            continue
        expected = reference.reported(
            torch.from_numpy(logits[r]), params, processed=processed, as_logits=as_logits
        ).numpy()
        assert_scores(out.out_logprobs[r : r + 1], expected[token : token + 1])
        top = out.top_logprobs[r, : num_top[r]]
        assert_scores(top, expected[out.top_ids[r, : num_top[r]]])
        assert_scores(top, -np.sort(-expected)[: num_top[r]])
        assert top.tolist() == sorted(top.tolist(), reverse=True), "best first"


@pytest.mark.parametrize(
    ("params", "processors"),
    [
        (RowParams(temperature=0.7), [logits_process.TemperatureLogitsWarper(0.7)]),
        (RowParams(top_k=40), [logits_process.TopKLogitsWarper(40)]),
        (RowParams(top_p=0.8), [logits_process.TopPLogitsWarper(0.8)]),
        (RowParams(min_p=0.02), [logits_process.MinPLogitsWarper(0.02)]),
        (
            RowParams(temperature=1.6, top_k=70, top_p=0.95, min_p=0.01),
            [
                logits_process.TemperatureLogitsWarper(1.6),
                logits_process.TopKLogitsWarper(70),
                logits_process.TopPLogitsWarper(0.95),
                logits_process.MinPLogitsWarper(0.01),
            ],
        ),
        (
            RowParams(repetition_penalty=1.3, temperature=0.9, top_k=60, prompt=(4, 9), output=(7, 4, 30)),
            [
                logits_process.RepetitionPenaltyLogitsProcessor(1.3),
                logits_process.TemperatureLogitsWarper(0.9),
                logits_process.TopKLogitsWarper(60),
            ],
        ),
    ],
)
def test_processed_scores_are_those_of_transformers(ctx, params, processors):
    logits = (np.random.default_rng(5).standard_normal((8, 2000)) * 3).astype(np.float32)
    rows = [dataclasses.replace(params, seed=r) for r in range(8)]
    known = torch.tensor([[*params.prompt, *params.output]] * 8, dtype=torch.long)
    theirs = logits_process.LogitsProcessorList(processors)(known, torch.from_numpy(logits.copy()))
    for as_logits in (False, True):
        expected = (theirs if as_logits else theirs.log_softmax(-1)).numpy()
        out = draw(ctx, logits, rows, [200] * 8, processed=True, as_logits=as_logits)
        for r in range(8):
            assert_scores(out.out_logprobs[r : r + 1], expected[r, out.out_ids[r : r + 1]])
            assert_scores(out.top_logprobs[r], expected[r, out.top_ids[r]])
            assert np.isfinite(expected[r]).sum() == 2000 or np.isneginf(out.top_logprobs[r]).any()


def test_far_tokens_are_kept_apart_from_those_that_are_dropped(ctx):
    """Too unlikely for a float32 weight is not ruled out."""
    logits = np.array([[0.0, -200.0, -1.0]], np.float32)
    out = draw(ctx, logits, [RowParams()], [3], processed=True, as_logits=False)
    assert out.top_ids[0].tolist() == [0, 2, 1]
    assert out.top_logprobs[0, 2] == pytest.approx(-200.3133, abs=1e-3)
    out = draw(ctx, logits, [RowParams(top_k=2)], [3], processed=True, as_logits=False)
    assert np.isneginf(out.top_logprobs[0, 2])
    out = draw(ctx, logits, [RowParams(top_p=0.9)], [3], processed=True, as_logits=False)
    assert np.isneginf(out.top_logprobs[0, 2])


def test_a_tiny_temperature_keeps_the_digits(ctx):
    logits = np.array([[10.0, 10.0, 9.9999]], np.float32)
    row = RowParams(temperature=1e-4)
    out = draw(ctx, logits, [row], [3], processed=True, as_logits=False)
    expected = reference.reported(torch.from_numpy(logits[0]), row, processed=True).numpy()
    np.testing.assert_allclose(out.top_logprobs[0], expected[out.top_ids[0]], rtol=0, atol=ATOL)


@pytest.mark.parametrize(("processed", "as_logits"), MODES)
def test_huge_and_broken_logits_give_numbers(ctx, processed, as_logits):
    logits = np.array([[3e38, 1.0, np.nan], [np.inf, 2.0, -np.inf], [1.0, 1.0, 1.0]], np.float32)
    rows = [RowParams(temperature=0.1), RowParams(temperature=0.5), RowParams(temperature=0.0)]
    out = draw(ctx, logits, rows, [2] * 3, processed=processed, as_logits=as_logits)
    assert not np.isnan(out.out_logprobs).any() and not np.isnan(out.top_logprobs).any()
    assert np.isfinite(out.out_logprobs).all()


@pytest.mark.parametrize(("processed", "as_logits"), MODES)
def test_scores_depend_on_neither_batch_nor_instruction_set(processed, as_logits):
    rng = np.random.default_rng(11)
    rows = [random_params(rng, 2050) for _ in range(24)]
    logits = (rng.standard_normal((24, 2050)) * 3).astype(np.float32)
    mode = {"processed": processed, "as_logits": as_logits}
    for isa in ISAS:
        together = draw(_native.ExecutionContext(2, isa), logits, rows, [4] * 24, **mode)
        for r in range(24):
            alone = draw(_native.ExecutionContext(1, isa), logits[r : r + 1], [rows[r]], [4], **mode)
            assert alone.out_logprobs[0].tobytes() == together.out_logprobs[r].tobytes()
            assert alone.top_logprobs[0].tobytes() == together.top_logprobs[r].tobytes()
        if isa in FMA_ISAS:
            first = draw(_native.ExecutionContext(1, FMA_ISAS[0]), logits, rows, [4] * 24, **mode)
            assert first.top_logprobs.tobytes() == together.top_logprobs.tobytes()


@pytest.mark.parametrize(("processed", "as_logits"), MODES)
def test_what_is_reported_changes_no_draw(ctx, processed, as_logits):
    rng = np.random.default_rng(4)
    rows = [random_params(rng, 500) for _ in range(40)]
    logits = (rng.standard_normal((40, 500)) * 3).astype(np.float32)
    silent = tensors_for(logits, rows)
    sample(ctx, silent)
    out = draw(ctx, logits, rows, [3] * 40, processed=processed, as_logits=as_logits)
    assert out.out_ids.tolist() == silent.out_ids.tolist()


def test_known_tokens_can_be_scored_by_their_logits(ctx):
    logits = np.random.default_rng(3).standard_normal((5, 300)).astype(np.float32)
    token_ids = np.array([3, 299, 0, 17, 5], np.int32)
    own, ids, top = np.full(5, np.nan, np.float32), np.zeros((5, 2), np.int32), np.zeros((5, 2), np.float32)
    score_tokens(ctx, logits.copy(), token_ids, np.full(5, 2, np.int32), own, ids, top, True)
    assert own.tolist() == logits[np.arange(5), token_ids].tolist()
    assert top.tolist() == (-np.sort(-logits, axis=1)[:, :2]).tolist()
