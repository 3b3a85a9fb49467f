"""The memory that holds the keys and values of all blocks."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch

from engine.models.any_model import AnySpec
from engine.ops.attention_plan import LayerCache


class KVCache:
    """The caches of every layer, of `dtype`: torch.int8 means codes, with a scale for each token and KV head.

    Cost: address space only; a page is paid for when its first token is written. Blocks lie anywhere, and
    each in a small page of its own would cost a walk through the page tables: the pages are huge, where
    the system has them.
    """

    def __init__(self, spec: AnySpec, *, num_blocks: int, block_size: int, dtype: torch.dtype) -> None:
        layers, heads, dim = spec.num_layers, spec.num_kv_heads, spec.head_dim
        keys = _allocate((layers, num_blocks, heads, dim, block_size), dtype)
        values = _allocate((layers, num_blocks, heads, block_size, dim), dtype)
        scales: Sequence[torch.Tensor | None] = [None] * layers
        if dtype == torch.int8:
            scales = _allocate((layers, num_blocks, heads, 2, block_size), torch.float32).unbind()
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
