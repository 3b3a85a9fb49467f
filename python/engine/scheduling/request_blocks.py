"""The blocks of requests: taken from the prefix cache, computed, shared through it, given back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from engine.scheduling.block_claims import BlockClaims
from engine.scheduling.request import Request


class PrefixCache(Protocol):
    """What the scheduler needs of `cache.prefix_cache.PrefixCache`."""

    num_blocks: int
    block_size: int
    enabled: bool

    @property
    def num_free(self) -> int: ...
    @property
    def num_cached(self) -> int: ...
    @property
    def num_in_use(self) -> int: ...
    @property
    def num_evicted_blocks(self) -> int: ...
    def match(self, namespace: str, token_ids: np.ndarray) -> tuple[int, np.ndarray, int | None]: ...
    def match_length(self, namespace: str, token_ids: np.ndarray) -> int: ...
    def insert(
        self, namespace: str, token_ids: np.ndarray, block_ids: np.ndarray, held: int | None
    ) -> tuple[int | None, np.ndarray, int]: ...
    def lock(self, node: int | None) -> None: ...
    def unlock(self, node: int | None) -> None: ...
    def try_allocate(self, count: int) -> np.ndarray | None: ...
    def release(self, block_ids: np.ndarray) -> None: ...
    def flush(self) -> None: ...
    def check(self) -> None: ...


class RequestBlocks:
    """Moves blocks between the cache and requests. A request holds its leading `num_shared` blocks by a
    lock on a node of the tree, and the others by reference."""

    def __init__(self, cache: PrefixCache) -> None:
        self._cache = cache
        self._block_size = cache.block_size
        self._claims = BlockClaims(cache.block_size)

    @property
    def num_available(self) -> int:
        """Blocks that nobody holds; cached ones are among them."""
        return self._cache.num_free + self._cache.num_cached

    def num_lacking(self, request: Request) -> int:
        """Blocks that a request lacks for its known tokens and one block more."""
        wanted = min(request.num_known + request.num_drawn + self._block_size, request.max_known)
        return -(-wanted // self._block_size) - request.num_blocks

    def cached_prefix_len(self, request: Request) -> int:
        """Tokens of a request that the cache has now."""
        return self._cache.match_length(request.namespace, request.token_ids[: request.num_matchable])

    def take_cached_prefix(self, request: Request) -> None:
        """Lock the longest cached prefix of a request that has not computed anything itself."""
        known = request.token_ids[: request.num_matchable]
        num_tokens, block_ids, node = self._cache.match(request.namespace, known)
        if num_tokens <= request.num_computed:
            return
        self._move_lock(request, node)
        request.block_table[: len(block_ids)] = block_ids
        request.num_blocks = request.num_shared = len(block_ids)
        request.num_computed = num_tokens

    def start(self, request: Request) -> bool:
        """Take what is cached and announce the rest, unless another is just computing the next block."""
        if not self._cache.enabled:
            return True
        awaited = request.awaited
        if awaited is not None and self._claims.is_computing(awaited, request, request.num_shared):
            return False
        self.take_cached_prefix(request)
        if not request.is_scoring:  # which nobody else's blocks can save
            request.awaited = self._claims.owner_of(request, request.num_shared)
        if request.awaited is not None:
            return False
        self._claims.claim(request, request.num_shared)
        return True

    def extend(self, request: Request, end: int) -> int:
        """Give a request blocks up to position `end`, or as many as there are; the end reached."""
        available = self.num_available
        wanted = -(-end // self._block_size) - request.num_blocks
        block_ids = self._cache.try_allocate(min(wanted, available))
        if block_ids is None:
            raise RuntimeError(f"the cache counts {available} blocks as available and gives none")
        request.block_table[request.num_blocks : request.num_blocks + len(block_ids)] = block_ids
        request.num_blocks += len(block_ids)
        return request.num_blocks * self._block_size

    def share(self, request: Request, end: int) -> None:
        """Put the full blocks below position `end` into the tree, and use the tree's where it has them.

        They are computed: what a step that still runs has been given is not among them.
        """
        full = end // self._block_size
        if full <= request.num_shared or not self._cache.enabled:
            return
        block_ids = request.block_table[:full].copy()
        tokens = request.token_ids[: full * self._block_size]
        node, canonical, _ = self._cache.insert(request.namespace, tokens, block_ids, request.node)
        self._move_lock(request, node)
        self._cache.release(block_ids[request.num_shared :])
        request.block_table[:full] = canonical
        request.num_shared = full
        if request.claimed:
            self._claims.drop(request, full)

    def release(self, request: Request) -> None:
        """Give everything back; what is in the tree stays there for whoever comes next."""
        self._claims.drop(request)
        if request.num_blocks > request.num_shared:
            self._cache.release(request.block_table[request.num_shared : request.num_blocks])
        self._move_lock(request, None)
        request.num_computed = request.num_blocks = request.num_shared = 0
        request.is_started = False
        request.awaited = None

    def check(self, running: Iterable[Request], waiting: Iterable[Request]) -> None:
        """Audit the books. Raises: `AssertionError`. Cost: linear in blocks."""
        cache, running = self._cache, list(running)
        cache.check()
        assert cache.num_free + cache.num_cached + cache.num_in_use == cache.num_blocks
        owned, shared = [], set()
        for request in running:
            owned.extend(request.block_table[request.num_shared : request.num_blocks].tolist())
            shared.update(request.block_table[: request.num_shared].tolist())
        assert len(owned) == len(set(owned)), "two requests own one block"
        assert not shared.intersection(owned), "a block is owned and shared"
        assert len(owned) + len(shared) == cache.num_in_use, "blocks in use that no running request holds"
        assert all(request.num_blocks == 0 for request in waiting), "a waiting request holds blocks"
        assert len(self._claims) == 0 or running, "claims without an owner"

    def _move_lock(self, request: Request, node: int | None) -> None:
        """Lock the new node before the old one is unlocked: what both cover is never free between."""
        self._cache.lock(node)
        self._cache.unlock(request.node)
        request.node = node
