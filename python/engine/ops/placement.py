"""Where the tensors of a model and of its steps lie, and what flows between its layers."""

from __future__ import annotations

import contextlib
import dataclasses

import torch


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """Handed down by the runner. What lives as long as a model is made `with placement.making():`; what a
    step makes has the device of the tensors that it is made of.

    `activations` is the dtype of rows between layers, the residual stream included. Weights of norms, biases,
    tables of positions and logits are float32 everywhere. `has_transposed_keys`: keys of a block lie
    [G, D, S] in the cache, not [G, S, D] as values do.
    """

    device: torch.device
    activations: torch.dtype
    has_transposed_keys: bool

    @property
    def is_host(self) -> bool:
        """Whether kernels read the very arrays that the scheduler's side writes."""
        return self.has_transposed_keys

    def making(self) -> contextlib.AbstractContextManager[object]:
        """Where tensors go for which no device is named: torch's own way to say it."""
        return contextlib.nullcontext() if self.is_host else self.device


CPU = Placement(torch.device("cpu"), torch.float32, has_transposed_keys=True)


def on_gpu(dtype: str, device: str = "cuda") -> Placement:
    """That of a model of `dtype` on a GPU; tests name another device."""
    return Placement(torch.device(device), getattr(torch, dtype), has_transposed_keys=False)
