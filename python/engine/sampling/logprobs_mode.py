"""What the reported log-probabilities are of (--logprobs-mode), and how impossible tokens are written."""

from __future__ import annotations

import numpy as np

IMPOSSIBLE = -9999.0
"""Stands for minus infinity, which JSON cannot write. Source: OpenAI API reference, `logprob`."""


def reports_processed(mode: str) -> bool:
    """Whether scores are those after penalties, bias, temperature and filters, not the model's own."""
    return mode.startswith("processed_")


def reports_logits(mode: str) -> bool:
    """Whether scores are logits, not log-probabilities."""
    return mode.endswith("_logits")


def floored(scores: np.ndarray) -> np.ndarray:
    """The same with `IMPOSSIBLE` for anything below it."""
    return np.maximum(scores, np.float32(IMPOSSIBLE))
