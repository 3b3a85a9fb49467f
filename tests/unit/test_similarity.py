"""Measures of likeness are those of sentence-transformers."""

from __future__ import annotations

import numpy as np
import pytest

from engine.core.similarity import MEASURES
from engine.models.sentence_files import SIMILARITIES


@pytest.mark.parametrize("name", SIMILARITIES)
def test_every_measure_is_theirs(name: str) -> None:
    from sentence_transformers.util.similarity import SimilarityFunction

    theirs = SimilarityFunction.to_similarity_pairwise_fn(name)
    first, second = np.random.default_rng(0).normal(size=(2, 20, 48))
    second[0] = first[0]
    ours = [MEASURES[name](a, b) for a, b in zip(first, second, strict=True)]
    assert np.allclose(ours, theirs(first, second).numpy(), rtol=1e-5, atol=1e-5)
    assert np.isfinite(MEASURES[name](np.zeros(3), np.ones(3)))
    assert not np.signbit(MEASURES[name](first[0], second[0]))  # a distance of none is written 0.0


def test_every_name_has_a_measure() -> None:
    assert tuple(MEASURES) == SIMILARITIES
