"""Random walks of the radix tree, the block allocator and the prefix cache against plain models.

Two token ids and tiny blocks make shared prefixes, splits and collisions the rule; hash masks make
the hashes collide too.
"""

from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from engine._native import BlockAllocator, RadixTree
from engine.cache.prefix_cache import PrefixCache
from engine.errors import NativeError

NUM_BLOCKS = 24
NAMESPACES = ["", "a", "b\0"]

Path = tuple[str, tuple[int, ...]]
"""A namespace and the tokens from the root: identifies the block that ends there."""

token_lists = st.lists(st.integers(0, 1), max_size=16)
namespaces = st.sampled_from(NAMESPACES)


class TreeModel:
    """What the tree promises, block by block: no nodes, no hashes, everything by searching."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.blocks: dict[Path, int] = {}
        self.ends: dict[int, Path] = {}
        """Path named by each handle that is not stale."""
        self.stale: list[int] = []
        self.locks: Counter[int] = Counter()
        self.order: list[Path] = []
        """Evictable blocks, least recently used first."""

    def prefixes(self, path: Path) -> list[Path]:
        namespace, tokens = path
        size = self.block_size
        return [(namespace, tokens[:end]) for end in range(size, len(tokens) + 1, size)]

    def longest(self, path: Path) -> Path:
        found = [prefix for prefix in self.prefixes(path) if prefix in self.blocks]
        return found[-1] if found else (path[0], ())

    def num_locks(self, path: Path) -> int:
        """Locks on the block at the end of `path`: all that end there or further down."""
        return sum(count for handle, count in self.locks.items() if path in self.prefixes(self.ends[handle]))

    def touch(self, path: Path) -> None:
        for prefix in reversed(self.prefixes(path)):
            if prefix in self.order:
                self.order.remove(prefix)
            if self.num_locks(prefix) == 0:
                self.order.append(prefix)

    def insert(self, path: Path, block_ids: list[int], node: int, held: int) -> list[int]:
        """Returns the block ids that were stored."""
        before = self.ends.get(node, path)
        if before != path:
            allowed = 1 if node == held else 0
            assert self.num_locks(before) <= allowed, "a leaf grew under somebody else's lock"
        self.ends[node] = path
        stored = []
        for prefix, block_id in zip(self.prefixes(path), block_ids, strict=True):
            if prefix not in self.blocks:
                self.blocks[prefix] = block_id
                stored.append(block_id)
        self.touch(path)
        return stored

    def lock(self, handle: int) -> None:
        self.locks[handle] += 1
        for prefix in self.prefixes(self.ends[handle]):
            if prefix in self.order:
                self.order.remove(prefix)

    def unlock(self, handle: int) -> None:
        self.locks[handle] -= 1
        self.locks += Counter()  # forgets zeros
        for prefix in reversed(self.prefixes(self.ends[handle])):
            if self.num_locks(prefix) == 0:
                self.order.append(prefix)

    def evict(self, num_blocks: int) -> list[int]:
        """Returns the block ids that were dropped."""
        victims, self.order = self.order[:num_blocks], self.order[num_blocks:]
        gone = [self.blocks.pop(path) for path in victims]
        for handle in [handle for handle, path in self.ends.items() if path not in self.blocks]:
            del self.ends[handle]
            self.stale.append(handle)
        return gone


class RadixTreeMachine(RuleBasedStateMachine):
    @initialize(block_size=st.integers(1, 4), hash_mask=st.sampled_from([0, 1, 2**31, 2**32 - 1]))
    def start(self, block_size: int, hash_mask: int) -> None:
        self.block_size = block_size
        self.allocator = BlockAllocator(NUM_BLOCKS)
        self.tree = RadixTree(self.allocator, block_size, hash_mask)
        self.model = TreeModel(block_size)
        self.references: Counter[int] = Counter()
        """The test's own references."""
        self.num_evicted = 0

    # --- rules

    @rule(namespace=namespaces, tokens=token_lists)
    def match(self, namespace: str, tokens: list[int]) -> None:
        token_ids = np.array(tokens, np.int32)
        expected = self.model.longest((namespace, tuple(tokens)))
        assert self.tree.match_length(namespace, token_ids) == len(expected[1])
        num_tokens, block_ids, node = self.tree.match(namespace, token_ids)
        assert num_tokens == len(expected[1])
        assert block_ids.tolist() == [self.model.blocks[p] for p in self.model.prefixes(expected)]
        assert (node == 0) == (num_tokens == 0)
        if node:
            assert self.model.ends.setdefault(node, expected) == expected
            self.model.touch(expected)

    @rule(
        namespace=namespaces,
        tokens=token_lists,
        own=st.lists(st.booleans(), min_size=16, max_size=16),
        pick=st.data(),
    )
    def insert(self, namespace: str, tokens: list[int], own: list[bool], pick: st.DataObject) -> None:
        num_blocks = len(tokens) // self.block_size
        if not self.make_room(num_blocks):
            return
        tokens = tokens[: num_blocks * self.block_size]
        path = (namespace, tuple(tokens))
        fresh = self.allocator.try_allocate(num_blocks)
        self.references.update(fresh.tolist())
        matched = self.model.prefixes(self.model.longest(path))
        given = fresh.copy()
        for i, prefix in enumerate(matched):
            if own[i]:
                given[i] = self.model.blocks[prefix]
        held = pick.draw(st.sampled_from([0, *self.model.locks]))
        node, block_ids, num_duplicates = self.tree.insert(namespace, np.array(tokens, np.int32), given, held)
        canonical = [self.model.blocks[p] for p in matched] + given.tolist()[len(matched) :]
        assert block_ids.tolist() == canonical
        assert num_duplicates == sum(a != b for a, b in zip(canonical, given.tolist(), strict=True))
        if num_blocks == 0:
            assert node == 0
            return
        self.model.insert(path, canonical, node, held)
        if pick.draw(st.booleans()):
            self.release(fresh.tolist())

    @precondition(lambda self: self.model.ends)
    @rule(pick=st.data())
    def lock(self, pick: st.DataObject) -> None:
        handle = pick.draw(st.sampled_from(sorted(self.model.ends)))
        self.tree.lock(handle)
        self.model.lock(handle)

    @precondition(lambda self: self.model.locks)
    @rule(pick=st.data())
    def unlock(self, pick: st.DataObject) -> None:
        handle = pick.draw(st.sampled_from(sorted(self.model.locks)))
        self.tree.unlock(handle)
        self.model.unlock(handle)

    @precondition(lambda self: self.model.stale)
    @rule(pick=st.data())
    def use_a_stale_handle(self, pick: st.DataObject) -> None:
        handle = pick.draw(st.sampled_from(self.model.stale))
        for use in (self.tree.lock, self.tree.unlock, self.tree.path_len):
            with pytest.raises(NativeError, match="names no node"):
                use(handle)

    @precondition(lambda self: self.model.ends)
    @rule(pick=st.data())
    def unlock_without_a_lock(self, pick: st.DataObject) -> None:
        handle = pick.draw(st.sampled_from(sorted(self.model.ends)))
        if self.model.locks[handle] == 0:
            with pytest.raises(NativeError, match="not locked"):
                self.tree.unlock(handle)

    @rule(num_blocks=st.integers(0, NUM_BLOCKS))
    def evict(self, num_blocks: int) -> None:
        gone = self.model.evict(num_blocks)
        assert self.tree.evict(num_blocks) == len(gone)
        self.num_evicted += len(gone)

    @rule()
    def clear(self) -> None:
        gone = self.model.evict(NUM_BLOCKS)
        assert self.tree.clear() == len(gone)
        self.num_evicted += len(gone)

    @precondition(lambda self: self.references)
    @rule(pick=st.data())
    def release_some(self, pick: st.DataObject) -> None:
        self.release(pick.draw(st.lists(st.sampled_from(sorted(self.references)), unique=True)))

    @precondition(lambda self: self.references)
    @rule(pick=st.data())
    def retain_some(self, pick: st.DataObject) -> None:
        block_ids = pick.draw(st.lists(st.sampled_from(sorted(self.references)), max_size=3))
        self.allocator.retain(np.array(block_ids, np.int32))
        self.references.update(block_ids)

    @precondition(lambda self: self.allocator.num_free)
    @rule(pick=st.data())
    def release_a_free_block(self, pick: st.DataObject) -> None:
        free = [i for i in range(NUM_BLOCKS) if self.allocator.ref_count(i) == 0]
        wrong = [*self.references, pick.draw(st.sampled_from(free))]
        with pytest.raises(NativeError, match="release: "):
            self.allocator.release(np.array(wrong, np.int32))

    def teardown(self) -> None:
        """The whole order of eviction, block by block."""
        if not hasattr(self, "model"):
            return
        while self.model.locks:
            handle = next(iter(self.model.locks))
            self.tree.unlock(handle)
            self.model.unlock(handle)
        while self.model.order:
            path = self.model.order[0]
            self.evict(1)
            token_ids = np.array(path[1], np.int32)
            assert self.tree.match_length(path[0], token_ids) == len(path[1]) - self.block_size
        assert self.tree.num_nodes == 0
        self.tree.check()

    # --- what must always hold

    @invariant()
    def the_structures_are_whole(self) -> None:
        self.allocator.check()
        self.tree.check()

    @invariant()
    def tree_and_model_agree(self) -> None:
        model = self.model
        assert self.tree.num_cached_blocks == len(model.blocks)
        assert self.tree.num_evictable_blocks == len(model.order)
        assert self.tree.num_namespaces == len({namespace for namespace, _ in model.blocks})
        assert self.tree.stats["num_evicted_blocks"] == self.num_evicted
        for path, block_id in model.blocks.items():
            assert self.tree.match_length(path[0], np.array(path[1], np.int32)) == len(path[1])
            assert (model.num_locks(path) == 0) == (path in model.order), block_id
        for handle, path in model.ends.items():
            assert self.tree.path_len(handle) * self.block_size == len(path[1])

    @invariant()
    def references_are_the_tests_and_the_trees(self) -> None:
        expected = self.references + Counter(self.model.blocks.values())
        for block_id in range(NUM_BLOCKS):
            assert self.allocator.ref_count(block_id) == expected[block_id]
        assert self.allocator.num_free == NUM_BLOCKS - len(expected)

    # --- helpers

    def release(self, block_ids: list[int]) -> None:
        self.allocator.release(np.array(block_ids, np.int32))
        self.references.subtract(block_ids)
        self.references += Counter()

    def make_room(self, num_blocks: int) -> bool:
        while self.allocator.num_free < num_blocks and self.model.order:
            self.evict(1)
        return self.allocator.num_free >= num_blocks


class PlayRequest:
    """A request of the machine below, by the book of PrefixCache."""

    def __init__(self, namespace: str, tokens: list[int]) -> None:
        self.namespace = namespace
        self.tokens = tokens
        self.table = np.full(32, -1, np.int32)
        self.num_blocks = 0
        self.num_computed = 0
        self.node: int | None = None

    def append_blocks(self, block_ids: np.ndarray) -> None:
        end = self.num_blocks + len(block_ids)
        self.table[self.num_blocks : end] = block_ids
        self.num_blocks = end


class PrefixCacheMachine(RuleBasedStateMachine):
    """Requests that come, compute, publish, are preempted and go; each block remembers what was
    written to it, so that a block with two owners or freed too early shows as wrong contents."""

    @initialize(block_size=st.integers(1, 3), num_blocks=st.integers(0, 20), enabled=st.booleans())
    def start(self, block_size: int, num_blocks: int, enabled: bool) -> None:
        self.cache = PrefixCache(num_blocks, block_size, enabled)
        self.requests: list[PlayRequest] = []
        self.contents: dict[int, dict[int, tuple]] = {i: {} for i in range(num_blocks)}

    @precondition(lambda self: len(self.requests) < 4)
    @rule(namespace=namespaces, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20))
    def admit(self, namespace: str, tokens: list[int]) -> None:
        request = PlayRequest(namespace, tokens)
        found, block_ids, request.node = self.cache.match(namespace, np.array(tokens[:-1], np.int32))
        self.cache.lock(request.node)
        assert found == 0 or self.cache.enabled
        request.append_blocks(block_ids)
        request.num_computed = found
        self.requests.append(request)

    @precondition(lambda self: self.requests)
    @rule(pick=st.data(), num_tokens=st.integers(1, 8))
    def compute(self, pick: st.DataObject, num_tokens: int) -> None:
        request = pick.draw(st.sampled_from(self.requests))
        size = self.cache.block_size
        end = min(request.num_computed + num_tokens, len(request.tokens))
        num_new = max(-(-end // size) - request.num_blocks, 0)
        room = self.cache.num_free + self.cache.num_cached
        num_evicted = self.cache.num_evicted_blocks
        block_ids = self.cache.try_allocate(num_new)
        assert (block_ids is None) == (num_new > room)
        if block_ids is None:
            assert self.cache.num_evicted_blocks == num_evicted, "evicted for nothing"
            return
        request.append_blocks(block_ids)
        for position in range(request.num_computed, end):
            written = (request.namespace, *request.tokens[: position + 1])
            self.contents[int(request.table[position // size])][position % size] = written
        request.num_computed = end

    @precondition(lambda self: self.requests)
    @rule(pick=st.data())
    def publish(self, pick: st.DataObject) -> None:
        self.publish_blocks(pick.draw(st.sampled_from(self.requests)))

    @precondition(lambda self: self.requests)
    @rule(pick=st.data(), publishes=st.booleans())
    def finish(self, pick: st.DataObject, publishes: bool) -> None:
        request = pick.draw(st.sampled_from(self.requests))
        if publishes:
            self.publish_blocks(request)
        num_shared = self.cache.path_len(request.node)
        self.cache.unlock(request.node)
        self.cache.release(request.table[num_shared : request.num_blocks])
        self.requests.remove(request)

    @rule()
    def flush(self) -> None:
        self.cache.flush()
        assert self.cache.num_cached == 0

    @invariant()
    def blocks_are_conserved(self) -> None:
        cache = self.cache
        cache.check()
        assert min(cache.num_free, cache.num_cached, cache.num_in_use) >= 0
        assert cache.num_free + cache.num_cached + cache.num_in_use == cache.num_blocks
        tables = [request.table[: request.num_blocks].tolist() for request in self.requests]
        assert cache.num_in_use == len(set().union(*tables))

    @invariant()
    def every_request_reads_what_was_written_for_it(self) -> None:
        size = self.cache.block_size
        for request in self.requests:
            for position in range(request.num_computed):
                content = self.contents[int(request.table[position // size])]
                assert content[position % size] == (request.namespace, *request.tokens[: position + 1])

    def publish_blocks(self, request: PlayRequest) -> None:
        full = request.num_computed // self.cache.block_size
        token_ids = np.array(request.tokens[: full * self.cache.block_size], np.int32)
        given = request.table[:full].copy()
        num_shared = self.cache.path_len(request.node)
        node, canonical, _ = self.cache.insert(request.namespace, token_ids, given, request.node)
        self.cache.lock(node)
        self.cache.unlock(request.node)
        self.cache.release(given[num_shared : self.cache.path_len(node)])
        request.table[:full] = canonical
        request.node = node


@pytest.mark.parametrize("machine", [RadixTreeMachine, PrefixCacheMachine])
def test_a_random_walk_agrees_with_the_model(machine: type[RuleBasedStateMachine]):
    run_state_machine_as_test(
        machine, settings=settings(max_examples=120, stateful_step_count=40, deadline=None)
    )


@pytest.mark.slow
@pytest.mark.parametrize("machine", [RadixTreeMachine, PrefixCacheMachine])
def test_a_long_random_walk_agrees_with_the_model(machine: type[RuleBasedStateMachine]):
    run_state_machine_as_test(
        machine, settings=settings(max_examples=3000, stateful_step_count=80, deadline=None)
    )
