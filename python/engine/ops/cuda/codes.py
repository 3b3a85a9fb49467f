"""Weights in few bits, as the products of `triton_product` read them.

Source: docs/decisions/0007-quantised-weights.md and 0015-quantised-checkpoints.md, for int8 and int4.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from engine.errors import NativeError

FORMATS = ("int8", "int4", "int4_affine", "fp8")
GROUP_LEN = {"int8": 128, "int4": 32, "int4_affine": 32}
ROW_BYTES = 128
LARGE_COLUMN = 4.0
LARGEST_E4M3 = 448.0


def bytes_of_row(in_features: int, dtype: str) -> int:
    codes_of_step = ROW_BYTES * _codes_of_byte(dtype)
    return -(-in_features // codes_of_step) * ROW_BYTES


def num_groups(in_features: int, dtype: str, group_len: int) -> int:
    """With those that only fill up; 0 for a format without groups."""
    return bytes_of_row(in_features, dtype) * _codes_of_byte(dtype) // group_len if group_len else 0


def quantize(weight: torch.Tensor, dtype: str, group_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [n, K] and scales [n, groups], of fp8 [n], of float32 weights [n, K]; to nearest."""
    if dtype == "fp8":
        scales = weight.abs().amax(1) / LARGEST_E4M3
        codes = (weight * _inverse(scales)[:, None]).clamp(-LARGEST_E4M3, LARGEST_E4M3)
        return codes.to(torch.float8_e4m3fn).view(torch.uint8), scales
    groups = _groups(weight, group_len)
    if dtype == "int8":
        zero, low, scales = 128, -127, groups.abs().amax(-1) / 127
        high = 127
    elif dtype == "int4":
        zero, low, high = 8, -8, 7
        place = groups.abs().argmax(-1, keepdim=True)
        scales = (-groups.gather(-1, place)[..., 0] / 8).half().float()
    else:
        raise NativeError(f"weight: floats are not rounded to {dtype}")
    codes = (groups * _inverse(scales)[..., None]).round().clamp(low, high) + zero
    return codes.to(torch.uint8).flatten(1)[:, : weight.shape[1]], scales


def bytes_of(codes: torch.Tensor, dtype: str, group_len: int) -> torch.Tensor:
    """Codes uint8 [n, K] as rows of a matrix, filled up with codes of any value: their scales are 0."""
    num_bytes = bytes_of_row(codes.shape[1], dtype)
    padding = num_bytes * _codes_of_byte(dtype) - codes.shape[1]
    codes = torch.nn.functional.pad(codes, (0, padding))
    if _codes_of_byte(dtype) == 1:
        return codes
    pairs = codes.unflatten(1, (-1, 2, group_len))
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1)


def column_scales(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """float32 [K]: powers of two for columns that are several times larger than the median one."""
    sizes = sum(part.double().abs().sum(0) for part in parts)
    median = sizes.sort().values[len(sizes) // 2]
    ratio = sizes / median if median > 0 else torch.ones_like(sizes)
    return torch.where(ratio > LARGE_COLUMN, ratio.log2().round().exp2(), torch.ones_like(ratio)).float()


def _codes_of_byte(dtype: str) -> int:
    return 2 if dtype.startswith("int4") else 1


def _groups(weight: torch.Tensor, group_len: int) -> torch.Tensor:
    padding = -weight.shape[1] % group_len
    return torch.nn.functional.pad(weight, (0, padding)).unflatten(1, (-1, group_len))


def _inverse(scales: torch.Tensor) -> torch.Tensor:
    return torch.where(scales != 0, 1 / scales, torch.zeros_like(scales))
