"""Sampling as the GPU runs it, against the float64 reference and the CPU's kernels."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from engine import _native
from engine.ops import sampling as cpu
from engine.ops.cuda.sampling import sample
from engine.ops.sampling import SamplingTensors
from ops.test_sampling import assert_drawn, random_params, tensors_for

pytestmark = pytest.mark.gpu

NUM_ROWS, NUM_TOP = 48, 5


def on_gpu(tensors: SamplingTensors) -> SamplingTensors:
    arrays = {name: getattr(tensors, name) for name in tensors.__slots__}
    moved = {k: torch.from_numpy(v).cuda() for k, v in arrays.items() if isinstance(v, np.ndarray)}
    return dataclasses.replace(tensors, **moved)


@pytest.mark.parametrize("vocab", [7, 1030, 2 * 8192 + 77])
def test_draws_and_scores_are_those_of_the_cpu(vocab):
    """Every setting at random; where a draw lies on an edge, another token than the CPU's may be right."""
    rng = np.random.default_rng(vocab)
    rows = [random_params(rng, vocab) for _ in range(NUM_ROWS)]
    logits = (rng.standard_normal((NUM_ROWS, vocab)) * rng.uniform(0.5, 6, size=(NUM_ROWS, 1))).astype(
        np.float32
    )
    expected = tensors_for(logits, rows, [min(NUM_TOP, vocab)] * NUM_ROWS)
    tensors = on_gpu(expected)
    cpu.sample(_native.ExecutionContext(1), expected)
    sample(None, tensors)
    found = tensors.out_ids.cpu().numpy()
    for r, params in enumerate(rows):
        assert_drawn(int(found[r]), logits[r], params)
    is_same = found == expected.out_ids
    assert is_same.sum() >= NUM_ROWS - 1
    for name in ("out_logprobs", "top_logprobs"):
        scores, wanted = getattr(tensors, name).cpu().numpy(), getattr(expected, name)
        np.testing.assert_allclose(scores[is_same], wanted[is_same], rtol=1e-5, atol=1e-5)
