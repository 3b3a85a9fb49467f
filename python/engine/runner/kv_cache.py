"""The memory that holds the keys and values of all blocks."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch

from engine.models.any_model import AnySpec
from engine.ops.attention_plan import LayerCache
from engine.ops.placement import CPU, Placement


class KVCache:
    """The caches of every layer. A `dtype` of 8 bits means codes, with a scale for each token and KV head.

    Cost: on the CPU address space only; a page is paid for when its first token is written, or soon
    will be (see `pages_ahead`). Blocks lie
    anywhere, and each in a small page of its own would cost a walk through the page tables: the pages are
    huge, where the system has them.
    """

    def __init__(
        self,
        spec: AnySpec,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        placement: Placement = CPU,
    ) -> None:
        layers, heads, dim = spec.num_layers, spec.num_kv_heads, spec.head_dim
        as_values = block_size, dim
        as_keys = (dim, block_size) if placement.has_transposed_keys else as_values

        def allocate(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
            sizes = layers, num_blocks, heads, *shape
            if placement.device.type == "cpu":
                return _allocate(sizes, dtype)
            return torch.zeros(sizes, dtype=dtype, device=placement.device)

        keys, values = allocate(as_keys, dtype), allocate(as_values, dtype)
        scales: Sequence[torch.Tensor | None] = [None] * layers
        if dtype.itemsize == 1:
            scales = allocate((2, block_size), torch.float32).unbind()
        self.layers = [LayerCache(*tensors) for tensors in zip(keys, values, scales, strict=True)]


def _allocate(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeroed elements that live as long as the tensor."""
    count = math.prod(shape)
    try:
        memory = mmap.mmap(-1, max(1, count * dtype.itemsize), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"the system refused {count * dtype.itemsize} bytes for the KV cache") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # only advice: a kernel may be built without it
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)
