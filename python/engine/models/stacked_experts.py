"""Checkpoints that hold the experts of a layer as one tensor a projection, as those of gpt-oss do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from engine.models.coded_weight import CodedWeight
from engine.models.gpt_oss import MXFP4_BLOCK
from engine.models.layers import FusedLinear, NamedSlots
from engine.models.weights import Slot

_TWICE_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12)
_SCALE_BIAS = 127


def stacked_slots(
    prefix: str, gate_up: Sequence[FusedLinear], down: Sequence[FusedLinear], stacking: str
) -> NamedSlots:
    """Slots that fill the experts. `stacking` is "dense", [experts, in, out], or "mxfp4".

    Rows of gate and up take turns in the checkpoint; here all of gate come first.
    """
    for name, linears, is_interleaved in (("gate_up_proj", gate_up, True), ("down_proj", down, False)):
        filler = _Filler(linears, is_interleaved)
        experts, rows, columns = len(linears), linears[0].out_features, linears[0].in_features
        bias = Slot((experts, rows), filler.store_bias, dummy="zeros")
        yield f"{prefix}.{name}_bias", bias
        if stacking == "dense":
            yield f"{prefix}.{name}", Slot((experts, columns, rows), filler.store_transposed)
        else:
            blocks = experts, rows, columns // MXFP4_BLOCK
            pair = _Pair(filler.store_mxfp4)
            yield f"{prefix}.{name}_blocks", Slot((*blocks, MXFP4_BLOCK // 2), pair.first, dtypes=("U8",))
            yield f"{prefix}.{name}_scales", Slot(blocks, pair.second, dtypes=("U8",))


def mxfp4_codes(blocks: torch.Tensor, scales: torch.Tensor) -> CodedWeight:
    """The same numbers as int8 codes, of blocks uint8 [rows, n, 16] and scales uint8 [rows, n].

    A byte holds two numbers, the first in its low bits. Source: OCP Microscaling Formats 1.0, 5.3 and 6.3.
    """
    codes = torch.tensor([128 + x for x in (*_TWICE_E2M1, *(-x for x in _TWICE_E2M1))], dtype=torch.uint8)
    numbers = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-3)
    halves = torch.ldexp(torch.full(scales.shape, 0.5), scales.int() - _SCALE_BIAS)
    return CodedWeight(codes[numbers.long()], halves)


class _Filler:
    """Takes stacked tensors apart."""

    def __init__(self, linears: Sequence[FusedLinear], is_interleaved: bool) -> None:
        self._linears, self._is_interleaved = linears, is_interleaved

    def store_bias(self, biases: torch.Tensor) -> None:
        for linear, bias in zip(self._linears, biases, strict=True):
            linear.bias.copy_(self._in_order(bias))

    def store_transposed(self, weights: torch.Tensor) -> None:
        for linear, weight in zip(self._linears, weights, strict=True):
            linear.fill([self._in_order(weight.T).contiguous()])

    def store_mxfp4(self, blocks: torch.Tensor, scales: torch.Tensor) -> None:
        for linear, block, scale in zip(self._linears, blocks, scales, strict=True):
            linear.fill_coded(mxfp4_codes(self._in_order(block), self._in_order(scale)))

    def _in_order(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows[0::2], rows[1::2]]) if self._is_interleaved else rows


class _Pair:
    """Two tensors that come one after the other, in any order, and are stored together."""

    def __init__(self, store: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        self._store = store
        self._parts: dict[int, torch.Tensor] = {}

    def first(self, tensor: torch.Tensor) -> None:
        self._take(0, tensor)

    def second(self, tensor: torch.Tensor) -> None:
        self._take(1, tensor)

    def _take(self, which: int, tensor: torch.Tensor) -> None:
        self._parts[which] = tensor
        if len(self._parts) == 2:
            self._store(self._parts[0], self._parts[1])
            self._parts.clear()
