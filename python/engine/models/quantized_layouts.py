"""The tensors in which AWQ, GPTQ and compressed-tensors store a matrix in few bits, and what they mean.

Source: AutoAWQ's WQLinear_GEMM and WQLinear_GEMV, AutoGPTQ's qlinear_cuda and compressed-tensors'
pack_quantized and naive_quantized compressors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

from engine.errors import CheckpointError
from engine.models.coded_weight import CodedWeight
from engine.models.quantized_config import Quantization

Tensors = Mapping[str, torch.Tensor]
Weight = CodedWeight | torch.Tensor
"""Floats where no packed matrix holds what is stored."""
_SCALES = ("F16", "BF16", "F32")
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The columns of eight that stand in a word of AWQ, from its lowest bits on."""


class Part(NamedTuple):
    """One of the tensors of a matrix."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


class Layout(NamedTuple):
    """`parts` names the tensors of a matrix [rows, columns]; `decode` makes a weight of them."""

    parts: Callable[[Quantization, int, int], dict[str, Part]]
    decode: Callable[[Quantization, Tensors], Weight]


def unpack(words: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """uint8 [..., n * 32 / bits] of int32 [..., n]: numbers from the lowest bits of each word on."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words[..., None] >> shifts) & (1 << bits) - 1).flatten(-2).to(torch.uint8)


def num_groups(quantization: Quantization, columns: int) -> int:
    return -(-columns // (quantization.group_size or columns))


# --- AWQ -----------------------------------------------------------------------------------------


def _awq_parts(quantization: Quantization, rows: int, columns: int) -> dict[str, Part]:
    groups = num_groups(quantization, columns)
    parts = {"qweight": Part((columns, rows // 8), ("I32",)), "scales": Part((groups, rows), _SCALES)}
    return parts if quantization.is_symmetric else parts | {"qzeros": Part((groups, rows // 8), ("I32",))}


def _awq(quantization: Quantization, tensors: Tensors) -> Weight:
    place = torch.tensor(_AWQ_ORDER).argsort()

    def in_order(words: torch.Tensor) -> torch.Tensor:
        return unpack(words).unflatten(-1, (-1, 8))[..., place].flatten(-2).T

    zeros = in_order(tensors["qzeros"]) if "qzeros" in tensors else None
    return _weight(quantization, in_order(tensors["qweight"]), tensors["scales"].T, zeros)


def _gemv_parts(quantization: Quantization, rows: int, columns: int) -> dict[str, Part]:
    """Zero points fill whole words, and of groups of 32 and 64 as many as 128 columns have."""
    together = max(128 // (quantization.group_size or columns), 1)
    words = math.ceil(math.ceil(num_groups(quantization, columns) / 8) / together) * together
    parts = {"qweight": Part((rows, columns // 8), ("I32",)), "scales": Part((rows, 8 * words), _SCALES)}
    return parts if quantization.is_symmetric else parts | {"qzeros": Part((rows, words), ("I32",))}


def _gemv(quantization: Quantization, tensors: Tensors) -> Weight:
    codes = unpack(tensors["qweight"])
    groups = num_groups(quantization, codes.shape[1])
    zeros = unpack(tensors["qzeros"])[:, :groups] if "qzeros" in tensors else None
    return _weight(quantization, codes, tensors["scales"][:, :groups], zeros)


# --- GPTQ ----------------------------------------------------------------------------------------


def _gptq_parts(quantization: Quantization, rows: int, columns: int) -> dict[str, Part]:
    groups = num_groups(quantization, columns)
    return {
        "qweight": Part((columns // 8, rows), ("I32",)),
        "qzeros": Part((groups, rows // 8), ("I32",)),
        "scales": Part((groups, rows), _SCALES),
        "g_idx": Part((columns,), ("I32",)),
    }


def _gptq(quantization: Quantization, tensors: Tensors) -> Weight:
    codes = unpack(tensors["qweight"].T.contiguous())
    zeros = unpack(tensors["qzeros"]).T + quantization.zero_bias & 15  # a zero point of 0 is stored as 15
    return _weight(quantization, codes, tensors["scales"].T, zeros, tensors["g_idx"])


# --- compressed-tensors ----------------------------------------------------------------------------


def _packed_parts(quantization: Quantization, rows: int, columns: int) -> dict[str, Part]:
    in_word, groups = 32 // quantization.bits, num_groups(quantization, columns)
    parts = {
        "weight_packed": Part((rows, -(-columns // in_word)), ("I32",)),
        "weight_scale": Part((rows, groups), _SCALES),
        "weight_shape": Part((2,), ("I64", "I32")),
    }
    if not quantization.is_symmetric:
        parts["weight_zero_point"] = Part((-(-rows // in_word), groups), ("I32",))
    if quantization.has_order:
        parts["weight_g_idx"] = Part((columns,), ("I32",))
    return parts


def _packed(quantization: Quantization, tensors: Tensors) -> Weight:
    rows, columns = tensors["weight_shape"].tolist()
    scales, codes = tensors["weight_scale"], unpack(tensors["weight_packed"], quantization.bits)
    zeros = None
    if not quantization.is_symmetric:
        zeros = unpack(tensors["weight_zero_point"].T.contiguous(), quantization.bits).T[:rows]
    return _weight(quantization, codes[:, :columns], scales, zeros, tensors.get("weight_g_idx"))


def _plain_parts(quantization: Quantization, rows: int, columns: int) -> dict[str, Part]:
    groups = (rows, num_groups(quantization, columns))
    parts = {"weight": Part((rows, columns), ("I8",)), "weight_scale": Part(groups, _SCALES)}
    if not quantization.is_symmetric:
        parts["weight_zero_point"] = Part(groups, ("I8",))
    return parts


def _plain(quantization: Quantization, tensors: Tensors) -> Weight:
    codes = tensors["weight"].view(torch.uint8) ^ 128
    zeros = None if quantization.is_symmetric else tensors["weight_zero_point"].view(torch.uint8) ^ 128
    return _weight(quantization, codes, tensors["weight_scale"], zeros)


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "awq": Layout(_awq_parts, _awq),
        "awq-gemv": Layout(_gemv_parts, _gemv),
        "gptq": Layout(_gptq_parts, _gptq),
        "pack-quantized": Layout(_packed_parts, _packed),
        "int-quantized": Layout(_plain_parts, _plain),
    }
)


def _weight(
    quantization: Quantization,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    group_of_column: torch.Tensor | None = None,
) -> Weight:
    """Of codes [N, K], scales [N, groups], and zero points [N, groups], None for the middle of the codes."""
    order = None
    columns, middle = codes.shape[1], 1 << quantization.bits - 1
    group_size = quantization.group_size or columns
    if group_of_column is not None:
        order = _order(group_of_column, group_size, quantization.has_order)
    if not quantization.is_packable:
        of_column = torch.arange(columns) // group_size if order is None else group_of_column.long()
        points = middle if zeros is None else zeros.float()[:, of_column]
        return ((codes.float() - points) * scales.float()[:, of_column]).contiguous()
    codes = codes if order is None else codes[:, order]
    ours = quantization.group_len
    of_ours = torch.arange(0, columns, ours) // group_size
    scales = scales[:, of_ours].contiguous()
    if quantization.bits == 8:
        return CodedWeight(codes.contiguous(), scales.float(), column_order=order)
    if quantization.is_symmetric and zeros is not None and not bool((zeros == middle).all()):
        raise CheckpointError("config.json says symmetric, but there are zero points other than 8")
    if quantization.is_symmetric and scales.dtype == torch.float16:
        return CodedWeight(codes.contiguous(), scales, column_order=order)
    points = torch.full_like(scales, middle).float() if zeros is None else zeros[:, of_ours].float()
    return CodedWeight(codes.contiguous(), scales.float(), -points * scales.float(), order)


def _order(group_of_column: torch.Tensor, group_size: int, may_differ: bool) -> torch.Tensor | None:
    """Columns in the order of their groups; None where that is their own.

    Raises: `CheckpointError` for groups of other sizes, or an order that config.json does not speak of.
    """
    columns = torch.arange(len(group_of_column)) // group_size
    order = group_of_column.argsort(stable=True)
    if not torch.equal(group_of_column[order].long(), columns):
        raise CheckpointError(f"g_idx does not make groups of {group_size} columns")
    if torch.equal(group_of_column.long(), columns):
        return None
    if not may_differ:
        raise CheckpointError("g_idx has an order of its own, but config.json does not say so (desc_act)")
    return order.int()
