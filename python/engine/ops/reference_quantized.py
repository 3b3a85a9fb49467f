"""What int8 and int4 weights do to a product, in plain PyTorch: the oracle of the native kernels.

Source: docs/decisions/0007-quantised-weights.md.
"""

from __future__ import annotations

import torch

ACTIVATION_GROUP = 128
OUTLIER_RATIO = 16.0
LARGE_COLUMN = 4.0
GROUP_LEN = {"int8": 128, "int4": 32, "int4_affine": 32}
ZERO_CODE = {"int8": 128, "int4": 8}


def quantize_weights(weight: torch.Tensor, dtype: str, group_len: int) -> torch.Tensor:
    """float32 [N, K]: each group of k rounded to the numbers that its scale allows."""
    groups = _groups(weight.float(), group_len)
    magnitude, place = groups.abs().max(-1, keepdim=True)
    if dtype == "int8":
        scale, low, high = magnitude / 127, -127, 127
    else:
        scale, low, high = (-groups.gather(-1, place) / 8).half().float(), -8, 7
    codes = (groups * _inverse(scale)).round().clamp(low, high)
    return _rows(codes * scale, weight.shape[1])


def quantize_activations(x: torch.Tensor) -> torch.Tensor:
    """float32 [T, K]: each group of k rounded to 8 bits, but for outliers, which stay as they are."""
    groups = _groups(x, ACTIVATION_GROUP)
    counts = _groups(torch.ones(1, x.shape[1]), ACTIVATION_GROUP).sum(-1, keepdim=True)
    is_outlier = groups.abs() > groups.abs().sum(-1, keepdim=True) * (OUTLIER_RATIO / counts)
    others = groups.masked_fill(is_outlier, 0)
    largest = others.abs().amax(-1, keepdim=True)
    factor = torch.where(largest > 0, 127 / largest, torch.zeros_like(largest))
    rounded = (others * factor).round() * (largest / 127)
    return _rows(torch.where(is_outlier, groups, rounded), x.shape[1])


def column_scales(parts: list[torch.Tensor]) -> torch.Tensor:
    """float32 [K]: powers of two for columns that are several times larger than the median one."""
    magnitudes = torch.cat([part.double() for part in parts]).abs().sum(0)
    ratio = magnitudes / magnitudes.sort().values[len(magnitudes) // 2]
    scales = torch.where(ratio > LARGE_COLUMN, ratio.log2().round().exp2(), torch.ones_like(ratio))
    return scales.float()


def dequantize(
    codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None, dtype: str, group_len: int
) -> torch.Tensor:
    """float32 [N, K] of codes uint8 [N, K], and scales and offsets [N, groups]: scale * (code - the code of
    zero), or of affine weights scale * code + offset, rounded after each operation."""
    groups = _groups(codes.float(), group_len)
    scales = scales.float()[..., None]
    weight = (groups - ZERO_CODE[dtype]) * scales if offsets is None else groups * scales + offsets[..., None]
    return _rows(weight, codes.shape[1])


def _groups(values: torch.Tensor, group_len: int) -> torch.Tensor:
    padding = -values.shape[1] % group_len
    return torch.nn.functional.pad(values, (0, padding)).unflatten(1, (-1, group_len))


def _rows(groups: torch.Tensor, num_k: int) -> torch.Tensor:
    return groups.flatten(1)[:, :num_k]


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale != 0, 1 / scale, torch.zeros_like(scale))
