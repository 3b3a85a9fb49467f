"""ops.score_tokens against a plain float64 reference, on every instruction set of the machine."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from engine import _native
from engine.errors import NativeError
from engine.ops import reference_sampling as reference
from engine.ops.reference_sampling import RowParams
from engine.ops.sampling import score_tokens
from ops.test_sampling import ISAS, draw


@pytest.fixture(scope="module", params=ISAS)
def ctx(request):
    return _native.ExecutionContext(2, request.param)


@dataclasses.dataclass
class Scores:
    """Results of `score_tokens`, filled with values that must not survive."""

    logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


def score(ctx, logits: np.ndarray, token_ids: list[int], num_top: list[int]) -> Scores:
    num_rows, most = len(logits), max(num_top, default=0)
    out = Scores(
        np.full(num_rows, np.nan, np.float32),
        np.full((num_rows, most), -77, np.int32),
        np.full((num_rows, most), np.nan, np.float32),
    )
    score_tokens(
        ctx,
        logits.copy(),
        np.array(token_ids, np.int32),
        np.array(num_top, np.int32),
        out.logprobs,
        out.top_ids,
        out.top_logprobs,
    )
    return out


@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 1000, 1025, 5003])
def test_scores_match_the_reference(ctx, vocab):
    rng = np.random.default_rng(vocab)
    logits = (rng.standard_normal((7, vocab)) * 4).astype(np.float32)
    token_ids = rng.integers(0, vocab, 7).tolist()
    num_top = [min(k, vocab) for k in (0, 1, 5, 20, 0, 3, 2)]
    out = score(ctx, logits, token_ids, num_top)
    for r, most in enumerate(num_top):
        expected = reference.log_softmax(torch.from_numpy(logits[r]))
        order = np.lexsort((np.arange(vocab), -logits[r]))[:most]
        # float32 results of magnitude about 10, from exponentials good to a few ulp
        np.testing.assert_allclose(out.logprobs[r], expected[token_ids[r]], rtol=0, atol=4e-6)
        assert out.top_ids[r, :most].tolist() == order.tolist()
        np.testing.assert_allclose(out.top_logprobs[r, :most], expected[order], rtol=0, atol=4e-6)
        assert np.all(out.top_ids[r, most:] == -77)


def test_scores_are_what_sampling_reports(ctx):
    rng = np.random.default_rng(2)
    logits = (rng.standard_normal((30, 3001)) * 4).astype(np.float32)
    logits[3, 100:200] = np.nan
    drawn = draw(ctx, logits, [RowParams(seed=r) for r in range(30)], [4] * 30)
    together = score(ctx, logits, drawn.out_ids.tolist(), [4] * 30)
    assert together.logprobs.tobytes() == drawn.out_logprobs.tobytes()
    assert together.top_ids.tolist() == drawn.top_ids.tolist()
    assert together.top_logprobs.tobytes() == drawn.top_logprobs.tobytes()
    for r in range(30):
        alone = score(ctx, logits[r : r + 1], [int(drawn.out_ids[r])], [4])
        assert alone.logprobs[0].tobytes() == together.logprobs[r].tobytes()


def test_scores_of_broken_logits_are_no_numbers_above_zero(ctx):
    logits = np.zeros((4, 40), np.float32)
    logits[0] = np.nan
    logits[1] = -np.inf
    logits[2, 5] = np.inf
    logits[3, 5] = -np.inf
    out = score(ctx, logits, [5] * 4, [0] * 4)
    assert out.logprobs.tolist() == [-math.inf, -math.inf, 0.0, -math.inf]


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, np.zeros((2, 0), np.float32), "logits: expected at least one token"),
        (0, np.zeros((2, 10), np.float64), "logits: expected float32, got float64"),
        (1, np.array([0, 10], np.int32), r"token_ids: expected ids in \[0, 10\), got 10"),
        (1, np.array([-1, 0], np.int32), r"token_ids: expected ids in \[0, 10\), got -1"),
        (1, np.zeros(3, np.int32), "token_ids: expected"),
        (2, np.array([0, 3], np.int32), "num_top_logprobs: expected at most K=2 and V=10, got 3"),
        (2, np.array([0, -1], np.int32), "num_top_logprobs: expected no negative"),
        (3, np.zeros(1, np.float32), "out_logprobs: expected"),
        (4, np.zeros((2, 3), np.int64), "top_ids: expected int32, got int64"),
        (5, np.zeros((2, 3), np.float32), "top_logprobs: expected"),
    ],
)
def test_wrong_arguments_of_scoring_are_named(ctx, position, value, message):
    arguments = [
        np.zeros((2, 10), np.float32),
        np.zeros(2, np.int32),
        np.zeros(2, np.int32),
        np.zeros(2, np.float32),
        np.zeros((2, 2), np.int32),
        np.zeros((2, 2), np.float32),
    ]
    arguments[position] = value
    with pytest.raises(NativeError, match=message):
        score_tokens(ctx, *arguments)
