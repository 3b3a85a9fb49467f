"""A prefix cache in plain Python: the reference for the native one, and its stand-in in tests."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(eq=False)
class _Node:
    """One block of one namespace. A block is identified by the path of token runs that leads to it."""

    parent: _Node | None
    key: tuple
    block_id: int
    handle: int
    locks: int = 0
    last_use: int = 0
    children: dict[tuple, _Node] = dataclasses.field(default_factory=dict)


class PlainPrefixCache:
    """One node a block, every operation by walking. Same interface and promises as `PrefixCache`.

    A block is free, or cached (in the tree, under no lock, with no reference but the tree's), or
    in use; `num_free + num_cached + num_in_use == num_blocks` always. `lock` protects a whole path.
    """

    def __init__(self, num_blocks: int, block_size: int, enabled: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enabled = enabled
        self.num_evicted_blocks = 0
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks
        self._roots: dict[str, _Node] = {}
        self._nodes: dict[int, _Node] = {}
        self._handles = itertools.count(1)
        self._clock = itertools.count(1)

    # --- the tree

    def match(self, namespace: str, token_ids: np.ndarray) -> tuple[int, np.ndarray, int | None]:
        path = self._walk(namespace, token_ids)
        now = next(self._clock)
        for node in path:
            node.last_use = now
        ids = np.array([node.block_id for node in path], np.int32)
        return len(path) * self.block_size, ids, path[-1].handle if path else None

    def match_length(self, namespace: str, token_ids: np.ndarray) -> int:
        return len(self._walk(namespace, token_ids)) * self.block_size

    def insert(
        self, namespace: str, token_ids: np.ndarray, block_ids: np.ndarray, held: int | None = None
    ) -> tuple[int | None, np.ndarray, int]:
        assert len(token_ids) == len(block_ids) * self.block_size
        canonical = np.array(block_ids, np.int32)
        if not self.enabled:
            return None, canonical, 0
        now = next(self._clock)
        node = self._roots.setdefault(namespace, _Node(None, (), -1, 0))
        num_duplicates = 0
        for i, key in enumerate(self._keys(token_ids)):
            child = node.children.get(key)
            if child is None:
                child = _Node(node, key, int(block_ids[i]), next(self._handles))
                node.children[key] = self._nodes[child.handle] = child
                assert self._references[child.block_id] > 0, "inserted a block that nobody holds"
                self._references[child.block_id] += 1
            elif child.block_id != block_ids[i]:
                canonical[i] = child.block_id
                num_duplicates += 1
            child.last_use = now
            node = child
        return node.handle or None, canonical, num_duplicates

    def lock(self, handle: int | None) -> None:
        for node in self._ancestors(handle):
            node.locks += 1

    def unlock(self, handle: int | None) -> None:
        for node in self._ancestors(handle):
            assert node.locks > 0, "unlocked more often than locked"
            node.locks -= 1

    # --- the blocks

    def try_allocate(self, count: int) -> np.ndarray | None:
        if count > self.num_free + self.num_cached:
            return None
        while len(self._free) < count:
            self._evict_one()
        ids = [self._free.pop() for _ in range(count)]
        for block_id in ids:
            self._references[block_id] = 1
        return np.array(ids, np.int32)

    def release(self, ids: Sequence[int] | np.ndarray) -> None:
        for block_id in ids:
            self._drop_reference(int(block_id))

    def flush(self) -> None:
        """Evict every cached block."""
        while self.num_cached:
            self._evict_one()

    # --- counts

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return sum(self._is_evictable(node) for node in self._nodes.values())

    @property
    def num_in_use(self) -> int:
        return self.num_blocks - self.num_free - self.num_cached

    def check(self) -> None:
        """Raise AssertionError when blocks are lost, held twice, or the tree is torn."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        for block_id in range(self.num_blocks):
            assert (self._references[block_id] == 0) == (block_id in free), f"block {block_id} is lost"
        held = [node.block_id for node in self._nodes.values()]
        assert len(held) == len(set(held)), "two nodes hold one block"
        for node in self._nodes.values():
            assert self._references[node.block_id] >= 1, "the tree holds a free block"
            assert node.locks >= max((child.locks for child in node.children.values()), default=0)

    # --- inside

    def _keys(self, token_ids: np.ndarray) -> list[tuple]:
        size = self.block_size
        tokens = np.asarray(token_ids).tolist()
        return [tuple(tokens[i : i + size]) for i in range(0, len(tokens) // size * size, size)]

    def _walk(self, namespace: str, token_ids: np.ndarray) -> list[_Node]:
        path: list[_Node] = []
        node = self._roots.get(namespace) if self.enabled else None
        if node is not None:
            for key in self._keys(token_ids):
                node = node.children.get(key)
                if node is None:
                    break
                path.append(node)
        return path

    def _ancestors(self, handle: int | None) -> list[_Node]:
        if handle is None:
            return []
        node = self._nodes[handle]
        path = []
        while node.parent is not None:
            path.append(node)
            node = node.parent
        return path

    def _is_evictable(self, node: _Node) -> bool:
        return (
            node.locks == 0
            and self._references[node.block_id] == 1
            and all(self._is_evictable(child) for child in node.children.values())
        )

    def _evict_one(self) -> None:
        leaves = [n for n in self._nodes.values() if not n.children and self._is_evictable(n)]
        victim = min(leaves, key=lambda node: node.last_use)
        del victim.parent.children[victim.key]
        del self._nodes[victim.handle]
        self._drop_reference(victim.block_id)
        self.num_evicted_blocks += 1

    def _drop_reference(self, block_id: int) -> None:
        assert self._references[block_id] > 0, f"block {block_id} was released twice"
        self._references[block_id] -= 1
        if self._references[block_id] == 0:
            self._free.append(block_id)
