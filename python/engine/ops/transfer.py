"""Arrays of a step on their way to the device, in one copy that nobody waits for, and results on theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

ALIGNMENT = 16
"""Bytes; the longest load of a kernel."""


def total_bytes(arrays: Sequence[np.ndarray]) -> int:
    """Length of the buffer that holds them."""
    return sum(_padded(array.nbytes) for array in arrays)


def send(
    arrays: Sequence[np.ndarray], device: torch.device, into: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """The same arrays on the device, in order.

    `into`, uint8 of at least `total_bytes`, is the memory that they are to have there; else they get their
    own. The copy waits in the stream for what was launched before. Its source is page-locked memory of
    torch's, which uses that again only after the copy.
    """
    staging = torch.empty(total_bytes(arrays), dtype=torch.uint8, pin_memory=device.type == "cuda")
    whole, start = staging.numpy(), 0
    for array in arrays:
        whole[start : start + array.nbytes].view(array.dtype)[:] = array.reshape(-1)
        start += _padded(array.nbytes)
    if into is None:
        into = staging.to(device, non_blocking=True)
    else:
        into[: len(staging)].copy_(staging, non_blocking=True)
    return views(arrays, into)


def fetch(tensors: Sequence[torch.Tensor]) -> Callable[[], list[np.ndarray]]:
    """Start copying results of the device to the host; the function waits for them, and gives them.

    It waits for what was launched before, and for nothing that was launched since: an event of its own says
    when they are there. The tensors may be given away, but not written on the host.
    """
    if tensors[0].device.type != "cuda":
        return lambda: [tensor.numpy() for tensor in tensors]
    hosts = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    for host, tensor in zip(hosts, tensors, strict=True):
        host.copy_(tensor, non_blocking=True)
    are_there = torch.cuda.Event()
    are_there.record()

    def wait() -> list[np.ndarray]:
        are_there.synchronize()
        return [host.numpy() for host in hosts]

    return wait


def views(arrays: Sequence[np.ndarray], memory: torch.Tensor) -> list[torch.Tensor]:
    """Where `send` puts arrays of these shapes and dtypes in its buffer."""
    tensors, start = [], 0
    for array in arrays:
        dtype = torch.from_numpy(array[:0]).dtype
        tensors.append(memory[start : start + array.nbytes].view(dtype).view(array.shape))
        start += _padded(array.nbytes)
    return tensors


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
