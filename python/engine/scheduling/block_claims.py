"""Which request is computing which block, so that no common prefix is computed twice at once."""

from __future__ import annotations

import numpy as np

from engine.scheduling.request import Request


class BlockClaims:
    """Blocks in flight: announced by the request that will compute them, removed once they are done.

    A block is known by a hash chained over all tokens up to its end and its namespace; a hit counts
    only when the tokens really are equal. A request that dies takes its claims with it.

    There is no deadlock: whoever holds claims never waits for a block, so a chain of waiting is one
    link long and ends at a request that can run. When that one is preempted its claims are gone, and
    the first of those that waited takes over.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._owners: dict[int, Request] = {}

    def __len__(self) -> int:
        return len(self._owners)

    def owner_of(self, request: Request, block: int) -> Request | None:
        """Who else is computing this block of `request`; None when nobody.

        Nor is the block of the last known token waited for: that token is computed in any case.
        """
        if not self._owners or (block + 1) * self._block_size >= request.num_known:
            return None
        owner = self._owners.get(self._key(request, block))
        if owner is None or owner is request or not self._same_tokens(owner, request, block):
            return None
        return owner

    def is_computing(self, owner: Request, request: Request, block: int) -> bool:
        """`owner_of(request, block) is owner`, for an owner that was returned before."""
        return self._owners.get(request.block_keys[block]) is owner

    def claim(self, request: Request, first: int) -> None:
        """Announce all full blocks of known tokens from `first` on that nobody has announced."""
        end = request.num_known // self._block_size
        for block in range(first, end):
            self._owners.setdefault(self._key(request, block), request)
        request.claimed = range(first, end)

    def drop(self, request: Request, end: int | None = None) -> None:
        """Remove the claims of `request` below block `end`; all of them without it."""
        claimed = request.claimed
        stop = claimed.stop if end is None else min(end, claimed.stop)
        for block in range(claimed.start, stop):
            key = request.block_keys[block]
            if self._owners.get(key) is request:
                del self._owners[key]
        request.claimed = range(max(claimed.start, stop), claimed.stop)

    def _key(self, request: Request, block: int) -> int:
        keys, size = request.block_keys, self._block_size
        while len(keys) <= block:
            start = len(keys) * size
            before = keys[-1] if keys else request.namespace
            keys.append(hash((before, request.token_ids[start : start + size].tobytes())))
        return keys[block]

    def _same_tokens(self, one: Request, other: Request, block: int) -> bool:
        end = (block + 1) * self._block_size
        return (
            one.namespace == other.namespace
            and one.num_known >= end
            and np.array_equal(one.token_ids[:end], other.token_ids[:end])
        )
