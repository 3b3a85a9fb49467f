"""The memory that holds the keys and values of all blocks."""

from __future__ import annotations

import torch

from engine.models.spec import ModelSpec


class KVCache:
    """Key and value caches of every layer.

    Shapes, for N blocks of S tokens: keys [N, G, D, S] (transposed within a block, so that vector
    lanes run along tokens), values [N, G, S, D], both of `dtype`.
    Cost: address space only; a page is paid for when its first token is written.
    """

    def __init__(self, spec: ModelSpec, *, num_blocks: int, block_size: int, dtype: torch.dtype) -> None:
        heads, dim = spec.num_kv_heads, spec.head_dim
        self.layers = [
            (
                torch.empty(num_blocks, heads, dim, block_size, dtype=dtype),
                torch.empty(num_blocks, heads, block_size, dim, dtype=dtype),
            )
            for _ in range(spec.num_layers)
        ]
