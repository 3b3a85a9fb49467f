"""Block tables: where the keys and values of a request's positions live.

A block table is an int32 array of fixed capacity whose first `num_blocks` entries are valid:
position p lives in slot block_table[p // block_size] * block_size + p % block_size.
"""

from __future__ import annotations

import numpy as np


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens, the last one perhaps in part."""
    return -(-num_tokens // block_size)


def append_blocks(block_table: np.ndarray, num_blocks: int, block_ids: np.ndarray) -> int:
    """Write `block_ids` behind the `num_blocks` valid entries; return the new number of entries.

    Raises: ValueError when the table has no room for them, and nothing is written.
    """
    end = num_blocks + len(block_ids)
    if end > len(block_table):
        raise ValueError(f"block_table: {len(block_table)} entries have no room for {end} blocks")
    block_table[num_blocks:end] = block_ids
    return end


def slot_ids(block_table: np.ndarray, start: int, stop: int, block_size: int) -> np.ndarray:
    """Slots of the positions [start, stop) of one request; their blocks must be in the table.

    Shapes: the result is int64 [stop - start].
    Cost: numpy calls only; about 3 µs for a decode row.
    """
    positions = np.arange(start, stop, dtype=np.int64)
    blocks, offsets = np.divmod(positions, block_size)
    return block_table[blocks].astype(np.int64) * block_size + offsets
