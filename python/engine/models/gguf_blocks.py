"""The blocks of GGUF's quantised types, taken apart into codes, scales and offsets, exactly.

A type that is not here, Q6_K for example, has groups or codes that no packed matrix has.
Source: block_q8_0, block_q4_0, block_q4_1 and block_q4_K in ggml/src/ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import torch

from engine.models.coded_weight import CodedWeight


def _q8_0(blocks: np.ndarray) -> CodedWeight:
    return CodedWeight(_rows(blocks[..., 2:] ^ 128), _rows(_halves(blocks, 0).astype(np.float32)))


def _q4_0(blocks: np.ndarray) -> CodedWeight:
    return CodedWeight(_rows(_nibbles(blocks[..., 2:])), _rows(_halves(blocks, 0)))


def _q4_1(blocks: np.ndarray) -> CodedWeight:
    scales, offsets = (_halves(blocks, at).astype(np.float32) for at in (0, 2))
    return CodedWeight(_rows(_nibbles(blocks[..., 4:])), _rows(scales), _rows(offsets))


def _q4_k(blocks: np.ndarray) -> CodedWeight:
    """Eight groups, whose scales and minima have 6 bits each and one factor for the block."""
    scale_factor, minimum_factor = (_halves(blocks, at).astype(np.float32) for at in (0, 2))
    low, middle, high = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scales = np.concatenate([low & 63, high & 15 | low >> 6 << 4], -1)
    minima = np.concatenate([middle & 63, high >> 4 | middle >> 6 << 4], -1)
    # Each 32 bytes hold two groups, one in the low halves and one in the high ones.
    codes = _nibbles(blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32))
    return CodedWeight(_rows(codes), _rows(scale_factor * scales), _rows(-(minimum_factor * minima)))


TAKE_APART: Mapping[str, Callable[[np.ndarray], CodedWeight]] = MappingProxyType(
    {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q4_K": _q4_k}
)
"""By type: from the bytes of a tensor, [rows, blocks, bytes of a block], to what `gguf_names.STORED` says."""


def _halves(blocks: np.ndarray, at: int) -> np.ndarray:
    """One half-precision number of each block, float16 [rows, blocks, 1]."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16)


def _nibbles(data: np.ndarray) -> np.ndarray:
    """Twice as many numbers: the low halves of all bytes, then the high ones."""
    return np.concatenate([data & 15, data >> 4], -1)


def _rows(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values).reshape(len(values), -1))
