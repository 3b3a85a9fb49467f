"""Slots for the several tensors in which a checkpoint stores a matrix in few bits."""

from __future__ import annotations

import functools
from collections.abc import Container, Mapping

import torch

from engine.errors import CheckpointError
from engine.models.quantized_config import Quantization
from engine.models.quantized_layouts import LAYOUTS
from engine.models.weights import Slot


def with_quantized(
    slots: Mapping[str, Slot],
    stored: Mapping[str, Quantization],
    names: Container[str],
) -> dict[str, Slot]:
    """The slots, those of the quantised matrices, which `stored` names, replaced by one for each of their
    tensors.

    Of the checkpoint's `names`, a bias that the architecture has not may be zero: AutoGPTQ writes one for
    each matrix.
    Raises: `CheckpointError` for a quantised matrix that the model does not have.
    """
    unknown = [name for name in stored if f"{name}.weight" not in slots]
    if unknown:
        raise CheckpointError(f"the checkpoint has {unknown[0]} in few bits, which this architecture has not")
    replaced: dict[str, Slot] = {}
    for name, slot in slots.items():
        stem = name.removesuffix(".weight")
        if name == stem or stem not in stored:
            replaced[name] = slot
            continue
        quantization = stored[stem]
        parts = LAYOUTS[quantization.method].parts(quantization, *slot.shape)
        collector = _Collector(stem, slot, quantization, len(parts))
        for kind, part in parts.items():
            store = collector.taker(kind)
            replaced[f"{stem}.{kind}"] = Slot(part.shape, store, dtypes=part.dtypes)
        bias = f"{stem}.bias"
        if bias in names and bias not in slots:
            replaced[bias] = Slot(slot.shape[:1], functools.partial(_check_zero, bias), dummy="zeros")
    return replaced


def _check_zero(name: str, bias: torch.Tensor) -> None:
    if bool(bias.any()):
        raise CheckpointError(f"tensor {name} is not zero, but this architecture has no such bias")


class _Collector:
    """Waits for all tensors of a matrix, which may come in any order."""

    def __init__(self, name: str, slot: Slot, quantization: Quantization, num_parts: int) -> None:
        self._name, self._slot, self._quantization = name, slot, quantization
        self._num_parts = num_parts
        self._tensors: dict[str, torch.Tensor] = {}

    def taker(self, kind: str):
        def take(tensor: torch.Tensor) -> None:
            self._tensors[kind] = tensor.clone()  # its file may be closed before the others come
            if len(self._tensors) == self._num_parts:
                self._store()

        return take

    def _store(self) -> None:
        stated = self._tensors.get("weight_shape")
        if stated is not None and stated.tolist() != list(self._slot.shape):
            says = f"weight_shape says {stated.tolist()}, but the matrix is {list(self._slot.shape)}"
            raise CheckpointError(f"{self._name}: {says}")
        try:
            weight = LAYOUTS[self._quantization.method].decode(self._quantization, self._tensors)
        except CheckpointError as error:
            raise CheckpointError(f"{self._name}: {error.message}") from None
        self._tensors.clear()
        self._slot.store(weight)
