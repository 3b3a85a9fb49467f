"""How much alike two vectors are, by the measures that sentence-transformers has names for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

_LEAST_NORM = 1e-12


def _cosine(a: np.ndarray, b: np.ndarray) -> np.floating:
    norms = [max(float(np.sqrt((x * x).sum())), _LEAST_NORM) for x in (a, b)]
    return (a / norms[0] * (b / norms[1])).sum()


MEASURES: Mapping[str, Callable[[np.ndarray, np.ndarray], np.floating]] = MappingProxyType(
    {
        "cosine": _cosine,
        "dot": lambda a, b: (a * b).sum(),
        "euclidean": lambda a, b: 0.0 - np.sqrt(np.square(a - b).sum()),  # 0.0, not -0.0, for equals
        "manhattan": lambda a, b: 0.0 - np.abs(a - b).sum(),
    }
)
"""More is more alike: distances are negative. Vectors are float64 [size]. Names are those of
`models.sentence_files.SIMILARITIES`."""
