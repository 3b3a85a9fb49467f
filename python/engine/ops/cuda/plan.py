"""Which kernel attends for which rows of a step."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from engine.ops.attention_plan import AttentionPlan

TILE_ROWS = 128
"""Queries of a sequence that one work item of the prefill kernel takes."""


@dataclasses.dataclass(slots=True)
class DevicePlan(AttentionPlan):
    """An `AttentionPlan` on the device, with the lists of work of both kernels, made on the host.

    Shapes: `decode_rows` int32 [n], sequences with one query, ascending; `tiles` int32 [m, 2], of the other
    sequences, each tile's sequence and its first query, counted from the sequence's first query here.
    `max_decode_kv_len` bounds `kv_lens` of the decode rows and `max_kv_len` all of them, so that no launch
    has to wait for the device; both may be larger than they need be.
    """

    decode_rows: torch.Tensor = dataclasses.field(kw_only=True)
    tiles: torch.Tensor = dataclasses.field(kw_only=True)
    max_decode_kv_len: int = dataclasses.field(kw_only=True)
    max_kv_len: int = dataclasses.field(kw_only=True)


def split_rows(cu_seqlens_q: np.ndarray, *, is_causal: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """`decode_rows` and `tiles` for prefix sums int32 [B + 1] of query counts, none of them 0. Whole texts,
    whose tokens see both ways, are tiles all: their heads may be smaller than those that decoding takes."""
    counts = np.diff(cu_seqlens_q)
    decodes = (counts == 1) & is_causal
    decode_rows, others = np.flatnonzero(decodes).astype(np.int32), np.flatnonzero(~decodes)
    tiles = [
        (sequence, first) for sequence in others.tolist() for first in range(0, counts[sequence], TILE_ROWS)
    ]
    return decode_rows, np.array(tiles, np.int32).reshape(-1, 2)
