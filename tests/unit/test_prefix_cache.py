"""Prefix cache and radix tree, one behaviour at a time; the random walks are in tests/property."""

import subprocess
import sys

import numpy as np
import pytest

from engine._native import BlockAllocator, RadixTree
from engine.cache.prefix_cache import PrefixCache
from engine.errors import NativeError


def tokens(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def remember(cache: PrefixCache, namespace: str, token_ids: np.ndarray) -> np.ndarray:
    """What a request that comes and goes leaves behind."""
    block_ids = cache.try_allocate(len(token_ids) // cache.block_size)
    _, canonical, _ = cache.insert(namespace, token_ids, block_ids)
    cache.release(block_ids)
    cache.check()
    return canonical


# --- matching ------------------------------------------------------------------------------------


def test_a_match_is_the_longest_prefix_in_whole_blocks():
    cache = PrefixCache(8, 2)
    kept = remember(cache, "", tokens(1, 2, 3, 4, 5, 6))
    for length, num_found in [(0, 0), (1, 0), (2, 2), (5, 4), (6, 6), (7, 6)]:
        wanted = tokens(1, 2, 3, 4, 5, 6, 7)[:length]
        assert cache.match_length("", wanted) == num_found
        num_tokens, block_ids, node = cache.match("", wanted)
        assert num_tokens == num_found
        assert block_ids.dtype == np.int32 and block_ids.tolist() == kept[: num_found // 2].tolist()
        assert (node is None) == (num_found == 0)
        assert cache.path_len(node) == num_found // 2
    assert cache.match("", tokens(1, 3, 3, 4))[0] == 0
    assert cache.match("", tokens(1, 2, 3, 5))[0] == 2


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_a_match_ends_where_a_long_run_differs(block_size: int):
    num_blocks = 70  # runs are compared in strides of several blocks
    cache = PrefixCache(num_blocks, block_size)
    run = np.arange(num_blocks * block_size, dtype=np.int32)
    remember(cache, "", run)
    for position in range(len(run)):
        other = run.copy()
        other[position] = -1
        assert cache.match_length("", other) == position // block_size * block_size
    assert cache.match_length("", run) == len(run)


def test_namespaces_share_nothing_and_leave_nothing():
    allocator = BlockAllocator(4)
    tree = RadixTree(allocator, 1)
    for namespace in ["", "adapter", "adapter\0salt", "ä"]:
        block_ids = allocator.try_allocate(1)
        tree.insert(namespace, tokens(7), block_ids)
        allocator.release(block_ids)
    assert tree.num_namespaces == 4
    assert len({tree.match(n, tokens(7))[1][0] for n in ["", "adapter", "adapter\0salt", "ä"]}) == 4
    assert tree.match("adapter\0", tokens(7))[0] == 0
    assert tree.clear() == 4
    assert tree.num_namespaces == 0 and tree.num_nodes == 0 and allocator.num_free == 4


def test_looking_up_and_refusing_leave_no_namespace():
    tree = RadixTree(BlockAllocator(1), 1)
    tree.match("a", tokens(1))
    tree.match_length("b", tokens(1))
    tree.insert("c", tokens(), tokens())
    with pytest.raises(NativeError):
        tree.insert("d", tokens(1), tokens(0))
    assert tree.num_namespaces == 0
    tree.check()


def test_negative_and_extreme_token_ids_are_plain_values():
    cache = PrefixCache(4, 1)
    remember(cache, "", tokens(-1, 2**31 - 1, -(2**31), 0))
    assert cache.match("", tokens(-1, 2**31 - 1, -(2**31), 0))[0] == 4


# --- shape ---------------------------------------------------------------------------------------


def test_a_sequence_that_grows_under_its_own_lock_is_one_node():
    allocator = BlockAllocator(100)
    tree = RadixTree(allocator, 1)
    block_ids = allocator.try_allocate(100)
    sequence = np.arange(100, dtype=np.int32)
    held = 0
    for length in range(1, 101):
        node, _, _ = tree.insert("", sequence[:length], block_ids[:length], held)
        tree.lock(node)
        tree.unlock(held)
        held = node
        tree.check()
    assert tree.num_nodes == 1
    assert tree.num_evictable_blocks == 0 and tree.path_len(held) == 100


def test_a_leaf_does_not_grow_under_the_lock_of_another():
    allocator = BlockAllocator(4)
    tree = RadixTree(allocator, 1)
    block_ids = allocator.try_allocate(4)
    node, _, _ = tree.insert("", tokens(1, 2), block_ids[:2])
    tree.lock(node)
    longer, _, _ = tree.insert("", tokens(1, 2, 3), block_ids[:3])
    assert longer != node and tree.num_nodes == 2
    assert tree.num_evictable_blocks == 1, "the new block is not under the old lock"
    tree.check()


def test_a_leaf_with_two_locks_grows_for_neither_holder():
    allocator = BlockAllocator(2)
    tree = RadixTree(allocator, 1)
    block_ids = allocator.try_allocate(2)
    node, _, _ = tree.insert("", tokens(1), block_ids[:1])
    tree.lock(node)
    tree.lock(node)
    longer, _, _ = tree.insert("", tokens(1, 2), block_ids, node)
    assert longer != node and tree.path_len(node) == 1
    assert tree.num_evictable_blocks == 1
    tree.check()


def test_a_split_leaves_handles_and_locks_where_they_were():
    allocator = BlockAllocator(8)
    tree = RadixTree(allocator, 1)
    first = allocator.try_allocate(4)
    node, _, _ = tree.insert("", tokens(1, 2, 3, 4), first)
    tree.lock(node)
    upper = tree.match("", tokens(1, 2, 9))[2]
    assert tree.num_nodes == 2
    assert tree.path_len(node) == 4 and tree.path_len(upper) == 2
    assert tree.num_evictable_blocks == 0
    tree.unlock(node)
    assert tree.num_evictable_blocks == 4
    with pytest.raises(NativeError, match="not locked"):
        tree.unlock(upper)
    tree.check()


def test_duplicates_are_counted_and_the_tree_keeps_its_own():
    allocator = BlockAllocator(8)
    tree = RadixTree(allocator, 2)
    kept = allocator.try_allocate(2)
    tree.insert("", tokens(1, 2, 3, 4), kept)
    again = allocator.try_allocate(3)
    mixed = np.array([kept[0], again[1], again[2]], np.int32)
    node, canonical, num_duplicates = tree.insert("", tokens(1, 2, 3, 4, 5, 6), mixed)
    assert num_duplicates == 1
    assert canonical.tolist() == [kept[0], kept[1], again[2]]
    assert tree.path_len(node) == 3
    assert [allocator.ref_count(i) for i in again] == [1, 1, 2]
    assert tree.stats == {
        "num_lookups": 0,
        "num_hits": 0,
        "num_inserted_blocks": 3,
        "num_duplicate_blocks": 1,
        "num_evicted_blocks": 0,
    }


# --- eviction ------------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first_from_its_end():
    cache = PrefixCache(6, 1)
    remember(cache, "", tokens(1, 2, 3))
    remember(cache, "", tokens(4, 5, 6))
    cache.match("", tokens(1))  # keeps 1 fresh, and not what follows it
    lengths = []
    for _ in range(6):
        block_ids = cache.try_allocate(1)
        assert block_ids is not None
        lengths.append((cache.match_length("", tokens(1, 2, 3)), cache.match_length("", tokens(4, 5, 6))))
        cache.check()
    assert lengths == [(2, 3), (1, 3), (1, 2), (1, 1), (1, 0), (0, 0)]
    assert cache.try_allocate(1) is None and cache.num_evicted_blocks == 6


@pytest.mark.parametrize("use", ["match", "insert", "unlock", "match_length"])
def test_what_counts_as_a_use(use: str):
    cache = PrefixCache(6, 1)
    remember(cache, "", tokens(1, 2))
    node = cache.match("", tokens(1, 2))[2]
    if use == "unlock":
        cache.lock(node)
    remember(cache, "", tokens(3, 4))
    if use == "match":
        cache.match("", tokens(1, 2))
    elif use == "insert":
        remember(cache, "", tokens(1, 2))
    elif use == "unlock":
        cache.unlock(node)
    else:
        cache.match_length("", tokens(1, 2))
    cache.try_allocate(4)
    kept, gone = (tokens(3, 4), tokens(1, 2)) if use == "match_length" else (tokens(1, 2), tokens(3, 4))
    assert cache.match_length("", kept) == 2 and cache.match_length("", gone) == 0


def test_what_is_locked_stays_and_nothing_is_evicted_for_nothing():
    cache = PrefixCache(4, 1)
    remember(cache, "", tokens(1, 2))
    remember(cache, "", tokens(3))
    node = cache.match("", tokens(1, 2))[2]
    cache.lock(node)
    assert (cache.num_free, cache.num_cached, cache.num_in_use) == (1, 1, 2)
    assert cache.try_allocate(3) is None
    assert (cache.num_free, cache.num_cached, cache.num_in_use) == (1, 1, 2)
    cache.lock(node)
    cache.unlock(node)
    assert cache.try_allocate(3) is None
    cache.unlock(node)
    assert len(cache.try_allocate(4)) == 4
    cache.check()


def test_flush_keeps_what_is_locked():
    cache = PrefixCache(4, 1)
    remember(cache, "a", tokens(1, 2, 3, 4))
    cache.lock(cache.match("a", tokens(1, 2))[2])
    cache.flush()
    assert cache.match_length("a", tokens(1, 2, 3, 4)) == 2
    assert (cache.num_free, cache.num_cached, cache.num_in_use) == (2, 0, 2)


# --- handles -------------------------------------------------------------------------------------


def test_a_handle_is_stale_once_a_block_of_its_path_is_gone():
    cache = PrefixCache(4, 1)
    remember(cache, "", tokens(1, 2, 3, 4))
    node = cache.match("", tokens(1, 2, 3, 4))[2]
    cache.try_allocate(1)  # takes the last block of the run
    for use in (cache.lock, cache.unlock, cache.path_len):
        with pytest.raises(NativeError, match="names no node") as caught:
            use(node)
        assert caught.value.slug == "stale_handle"
    cache.check()


def test_a_handle_is_stale_although_its_place_is_used_again():
    cache = PrefixCache(1, 1)
    remember(cache, "", tokens(1))
    node = cache.match("", tokens(1))[2]
    cache.flush()
    remember(cache, "", tokens(1))
    assert cache.match("", tokens(1))[2] != node
    with pytest.raises(NativeError, match="names no node"):
        cache.lock(node)


@pytest.mark.parametrize("handle", [1, 2, 5, 1 << 32, (1 << 32) + 1, (1 << 64) - 1])
def test_made_up_handles_are_refused(handle: int):
    tree = RadixTree(BlockAllocator(4), 1)
    for use in (tree.lock, tree.unlock, tree.path_len):
        with pytest.raises(NativeError, match="names no node"):
            use(handle)
    tree.check()


def test_the_handle_of_a_root_or_of_a_free_place_is_refused():
    allocator = BlockAllocator(1)
    tree = RadixTree(allocator, 1)
    node, _, _ = tree.insert("", tokens(1), allocator.try_allocate(1))
    for generation in range(3):
        for index in range(8):
            handle = generation << 32 | index
            if handle not in (0, node):
                with pytest.raises(NativeError, match="names no node"):
                    tree.lock(handle)
    tree.clear()
    for generation in range(3):
        for index in range(1, 8):
            with pytest.raises(NativeError, match="names no node"):
                tree.lock(generation << 32 | index)


# --- wrong calls ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token_ids", "block_ids", "message"),
    [
        (tokens(1, 2, 3), tokens(2), "token_ids: expected 1 blocks of 2, got 3 tokens"),
        (tokens(1, 2), tokens(2, 3), "token_ids: expected 2 blocks of 2, got 2 tokens"),
        (tokens(1, 2, 5, 6), tokens(2, 2), "block 2 is in the tree already, or given twice"),
        (tokens(1, 2, 9, 9), tokens(0, 1), "block 1 is in the tree already, or given twice"),
        (tokens(9, 9), tokens(0), "block 0 is in the tree already, or given twice"),
        (tokens(1, 2), tokens(1), "block 1 is in the tree already, or given twice"),
        (tokens(1, 2, 9, 9), tokens(0, 4), "block 4 is not allocated"),
        (tokens(1, 2), tokens(4), "block 4 is not allocated"),
        (tokens(9, 9, 8, 8), tokens(2, -1), "block -1 is not allocated"),
        (tokens(9, 9), tokens(99), "block 99 is not allocated"),
    ],
)
def test_a_wrong_insert_changes_nothing(token_ids: np.ndarray, block_ids: np.ndarray, message: str):
    allocator = BlockAllocator(6)
    tree = RadixTree(allocator, 2)
    allocator.try_allocate(4)
    tree.insert("", tokens(1, 2, 3, 4), tokens(0, 1))
    before = [allocator.ref_count(i) for i in range(6)]
    with pytest.raises(NativeError, match=message):
        tree.insert("", token_ids, block_ids)
    assert [allocator.ref_count(i) for i in range(6)] == before
    assert tree.num_cached_blocks == 2 and tree.num_nodes == 1
    tree.check()
    tree.insert("", tokens(9, 9, 8, 8), tokens(2, 3))  # no mark was left on any block
    tree.check()


def test_wrong_arrays_name_the_argument():
    cache = PrefixCache(2, 1)
    for method in (cache.match, cache.match_length):
        with pytest.raises(NativeError, match="token_ids: expected .* got dtype int64"):
            method("", np.array([1]))
        with pytest.raises(NativeError, match="token_ids: expected .* got list"):
            method("", [1])
    with pytest.raises(NativeError, match="token_ids"):
        cache.insert("", np.array([1]), tokens(0))
    with pytest.raises(NativeError, match="block_ids"):
        cache.insert("", tokens(1), np.array([0]))


@pytest.mark.parametrize("block_size", [0, -1, 2**40])
def test_an_impossible_block_size_is_refused(block_size: int):
    with pytest.raises(NativeError, match="block_size: expected"):
        PrefixCache(1, block_size)


def test_check_sees_a_reference_that_somebody_else_dropped():
    allocator = BlockAllocator(2)
    tree = RadixTree(allocator, 1)
    block_ids = allocator.try_allocate(1)
    tree.insert("", tokens(1), block_ids)
    allocator.release(block_ids)
    tree.check()
    allocator.release(block_ids)  # the tree's own
    with pytest.raises(NativeError, match="not allocated") as caught:
        tree.check()
    assert caught.value.slug == "internal_error"


def test_the_tree_keeps_its_allocator_alive():
    tree = RadixTree(BlockAllocator(1), 1)
    assert tree.match("", tokens(1))[0] == 0
    tree.check()


TRIM = """
import numpy as np, psutil
from engine._native import BlockAllocator, RadixTree
process, num_blocks = psutil.Process(), 600_000
allocator = BlockAllocator(num_blocks)
tree = RadixTree(allocator, 16)
tree.insert("", np.ones(num_blocks * 16, np.int32), allocator.try_allocate(num_blocks))
full = process.memory_info().rss
tree.evict(num_blocks - 1)
print((full - process.memory_info().rss) / (num_blocks * 16 * 4))
"""


def test_the_memory_of_a_trimmed_run_is_given_back():
    # Over 32 MiB of tokens: what is smaller the C library may keep in its heap, whoever frees it. In a
    # process of its own: a heap that others have used may have a hole of that size, and keeps it.
    ran = subprocess.run([sys.executable, "-c", TRIM], capture_output=True, text=True, check=True)
    assert float(ran.stdout) > 0.9, "of what the tokens took"


# --- disabled ------------------------------------------------------------------------------------


def test_a_disabled_cache_finds_and_keeps_nothing():
    cache = PrefixCache(2, 1, enabled=False)
    block_ids = cache.try_allocate(2)
    node, canonical, num_duplicates = cache.insert("", tokens(1, 2), block_ids)
    assert node is None and canonical.tolist() == block_ids.tolist() and num_duplicates == 0
    assert cache.match("", tokens(1, 2))[0] == cache.match_length("", tokens(1, 2)) == 0
    cache.lock(node)
    cache.unlock(node)
    assert cache.path_len(node) == 0
    assert (cache.num_free, cache.num_cached, cache.num_in_use) == (0, 0, 2)
    cache.release(block_ids)
    assert (cache.num_free, cache.num_cached, cache.num_in_use) == (2, 0, 0)
