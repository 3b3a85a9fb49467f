"""The memory of the KV cache in the scheduler's words: prefixes that are found again, and blocks."""

from __future__ import annotations

import numpy as np

from engine._native import BlockAllocator, RadixTree

_EMPTY_PATH = 0
"""The native handle of the path without blocks; here it is None."""


class PrefixCache:
    """All KV blocks of an engine, and the tree of the prefixes that they hold.

    A block is free; or cached: in the tree and under no lock, so that it can be evicted; or in
    use. `num_free + num_cached + num_in_use == num_blocks` always.

    The rules for a caller, who is one request:
    - Blocks from `try_allocate` carry one reference, the caller's, until `release`. The tree takes
      references of its own.
    - Blocks that `match` found belong to the tree. Lock the node before anything else is called,
      or they may be evicted; use them until `unlock`.
    - After `insert`: lock the new node, unlock the old one, use the block ids that were returned,
      and release your references to what is in the tree now: the given block_ids[old:new], where
      old is the path_len of your node before the insertion and new that of the new node. Stored
      blocks stay under the lock, duplicates become free, and no block is ever without an owner.

    With `enabled=False` nothing is found and nothing is kept: `match` finds nothing, `insert`
    returns no node and the given ids, and the caller goes on owning its blocks.

    Nodes are None (no blocks, nothing to lock) or an int that names a path for as long as the
    caller has it locked. Arrays of ids are contiguous int32. `token_ids` may end within a block
    where a method says so.
    Raises: NativeError on a wrong call (a stale node, a block released twice, another dtype);
    nothing has changed then.
    """

    def __init__(self, num_blocks: int, block_size: int, enabled: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enabled = enabled
        self._allocator = BlockAllocator(num_blocks)
        self._tree = RadixTree(self._allocator, block_size)

    def tree_stats(self) -> dict[str, int]:
        """Size and counters of the tree."""
        return {**self._tree.stats, "nodes": self._tree.num_nodes, "namespaces": self._tree.num_namespaces}

    # --- prefixes

    def match(self, namespace: str, token_ids: np.ndarray) -> tuple[int, np.ndarray, int | None]:
        """Find the longest cached prefix: (its tokens, its block ids, its node).

        Whole blocks only; the rest of `token_ids` may be any length.
        Effects: counts as a use of the prefix for eviction.
        """
        num_tokens, block_ids, node = self._tree.match(namespace, token_ids)
        return num_tokens, block_ids, node or None

    def match_length(self, namespace: str, token_ids: np.ndarray) -> int:
        """Tokens that `match` would find. Changes nothing."""
        return self._tree.match_length(namespace, token_ids)

    def insert(
        self, namespace: str, token_ids: np.ndarray, block_ids: np.ndarray, held: int | None = None
    ) -> tuple[int | None, np.ndarray, int]:
        """Remember that `block_ids` hold `token_ids`: (node, ids to use from now on, duplicates).

        `token_ids` fills the blocks exactly, from position 0. Where the tree has other blocks for
        the same tokens, those win, and the given ones are duplicates. Give the node that you have
        locked as `held`, so that a sequence which only you extend stays one node; the new node may
        then be the same, its path having grown.
        """
        if not self.enabled:
            return None, block_ids, 0
        node, canonical, num_duplicates = self._tree.insert(
            namespace, token_ids, block_ids, _EMPTY_PATH if held is None else held
        )
        return node or None, canonical, num_duplicates

    def lock(self, node: int | None) -> None:
        """Keep the blocks of the path that ends at `node` until as many calls of `unlock`."""
        if node is not None:
            self._tree.lock(node)

    def unlock(self, node: int | None) -> None:
        """Undo one `lock`. Effects: blocks under no lock any more are the most recently used."""
        if node is not None:
            self._tree.unlock(node)

    def path_len(self, node: int | None) -> int:
        """Blocks of the path that ends at `node`."""
        return 0 if node is None else self._tree.path_len(node)

    # --- blocks

    def try_allocate(self, count: int) -> np.ndarray | None:
        """`count` blocks with one reference each, or None when there are not enough.

        Effects: evicts the least recently used cached blocks as needed; none when it returns None.
        """
        num_missing = count - self._allocator.num_free
        if num_missing > 0:
            if num_missing > self._tree.num_evictable_blocks:
                return None
            self._tree.evict(num_missing)
        return self._allocator.try_allocate(count)

    def release(self, block_ids: np.ndarray) -> None:
        """Give back one reference to each block."""
        self._allocator.release(block_ids)

    def flush(self) -> None:
        """Evict every cached block."""
        self._tree.clear()

    # --- counts

    @property
    def num_free(self) -> int:
        return self._allocator.num_free

    @property
    def num_cached(self) -> int:
        """Blocks that nobody uses and that hold a prefix: free as soon as they are needed."""
        return self._tree.num_evictable_blocks

    @property
    def num_in_use(self) -> int:
        return self.num_blocks - self.num_free - self.num_cached

    @property
    def num_evicted_blocks(self) -> int:
        return self._tree.stats["num_evicted_blocks"]

    def check(self) -> None:
        """Raise NativeError that names the first broken invariant of the tree or the free list.

        Cost: O(num_blocks).
        """
        self._allocator.check()
        self._tree.check()
