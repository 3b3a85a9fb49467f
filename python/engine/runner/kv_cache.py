"""The memory that holds the keys and values of all blocks."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch

from engine.models.any_model import AnySpec


class KVCache:
    """Key and value caches of every layer.

    Shapes, for N blocks of S tokens: keys [N, G, D, S] (transposed within a block, so that vector
    lanes run along tokens), values [N, G, S, D], both of `dtype`.
    Cost: address space only; a page is paid for when its first token is written. Blocks lie anywhere, and
    each in a small page of its own would cost a walk through the page tables: the pages are huge, where
    the system has them.
    """

    def __init__(self, spec: AnySpec, *, num_blocks: int, block_size: int, dtype: torch.dtype) -> None:
        heads, dim = spec.num_kv_heads, spec.head_dim
        shapes = (num_blocks, heads, dim, block_size), (num_blocks, heads, block_size, dim)
        tensors = _allocate(2 * spec.num_layers * math.prod(shapes[0]), dtype).chunk(2 * spec.num_layers)
        self.layers = [
            (keys.view(shapes[0]), values.view(shapes[1]))
            for keys, values in zip(tensors[::2], tensors[1::2], strict=True)
        ]


def _allocate(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeroed elements that live as long as the tensor."""
    try:
        memory = mmap.mmap(-1, max(1, count * dtype.itemsize), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"the system refused {count * dtype.itemsize} bytes for the KV cache") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # only advice: a kernel may be built without it
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count)
