"""Block allocator: what it hands out, and that a wrong call changes nothing."""

import numpy as np
import pytest

from engine._native import BlockAllocator
from engine.errors import NativeError


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def counts(allocator: BlockAllocator) -> list[int]:
    return [allocator.ref_count(i) for i in range(allocator.num_blocks)]


def test_hands_out_each_block_once_in_order():
    allocator = BlockAllocator(5)
    first, second = allocator.try_allocate(2), allocator.try_allocate(3)
    assert first.dtype == np.int32
    assert first.tolist() == [0, 1] and second.tolist() == [2, 3, 4]
    assert allocator.num_free == 0


def test_gives_all_or_nothing():
    allocator = BlockAllocator(3)
    assert allocator.try_allocate(4) is None
    assert allocator.num_free == 3
    assert allocator.try_allocate(0).tolist() == []
    assert allocator.try_allocate(3) is not None
    assert allocator.try_allocate(1) is None


def test_the_block_freed_last_comes_first_and_a_run_keeps_its_order():
    allocator = BlockAllocator(10)
    taken = allocator.try_allocate(10)
    allocator.release(taken[2:5])
    allocator.release(taken[7:9])
    assert allocator.try_allocate(5).tolist() == [7, 8, 2, 3, 4]


def test_a_block_is_free_when_its_last_reference_goes():
    allocator = BlockAllocator(2)
    taken = allocator.try_allocate(1)
    allocator.retain(taken)
    allocator.release(taken)
    assert allocator.num_free == 1 and allocator.ref_count(0) == 1
    allocator.release(taken)
    assert allocator.num_free == 2 and allocator.ref_count(0) == 0
    allocator.check()


@pytest.mark.parametrize(
    "bad", [ids(0, 1, 0), ids(1, 1), ids(0, 2), ids(0, -1), ids(0, 4), ids(3), ids(2**31 - 1), ids(-(2**31))]
)
def test_a_wrong_release_is_refused_whole(bad: np.ndarray):
    allocator = BlockAllocator(4)
    allocator.try_allocate(2)  # 0 and 1 are allocated, 2 and 3 are free
    before = counts(allocator)
    with pytest.raises(NativeError, match="release: "):
        allocator.release(bad)
    assert counts(allocator) == before and allocator.num_free == 2
    allocator.check()
    assert sorted(allocator.try_allocate(2).tolist()) == [2, 3]


@pytest.mark.parametrize("bad", [ids(0, 2), ids(0, 1, -1), ids(0, 4)])
def test_a_wrong_retain_is_refused_whole(bad: np.ndarray):
    allocator = BlockAllocator(4)
    allocator.try_allocate(2)
    before = counts(allocator)
    with pytest.raises(NativeError, match="retain: "):
        allocator.retain(bad)
    assert counts(allocator) == before
    allocator.check()


def test_a_repeated_id_takes_and_drops_as_many_references():
    allocator = BlockAllocator(1)
    taken = allocator.try_allocate(1)
    allocator.retain(ids(0, 0))
    assert allocator.ref_count(0) == 3
    allocator.release(ids(0, 0, 0))
    assert allocator.num_free == 1 and taken.tolist() == [0]


@pytest.mark.parametrize(
    "bad",
    [
        np.array([0], np.int64),
        np.array([0], np.uint32),
        np.array([0.0], np.float32),
        np.array([[0]], np.int32),
        np.array(0, np.int32),
        np.array([0, 0, 0, 0], np.int32)[::2],
        np.array([0], np.int32).astype(">i4"),
        np.frombuffer(bytes(5), np.uint8)[1:].view(np.int32),
        [0],
        0,
        None,
    ],
    ids=[
        "int64",
        "uint32",
        "float",
        "2-d",
        "0-d",
        "strided",
        "big-endian",
        "unaligned",
        "list",
        "int",
        "None",
    ],
)
def test_only_plain_int32_arrays_are_taken(bad: object):
    allocator = BlockAllocator(2)
    allocator.try_allocate(1)
    with pytest.raises(NativeError, match="block_ids: expected a contiguous one-dimensional int32"):
        allocator.release(bad)
    assert allocator.ref_count(0) == 1


@pytest.mark.parametrize("num_blocks", [-1, 2**31, 2**62])
def test_an_impossible_size_is_refused(num_blocks: int):
    with pytest.raises(NativeError, match="num_blocks: expected"):
        BlockAllocator(num_blocks)


def test_an_allocator_may_be_empty():
    allocator = BlockAllocator(0)
    assert allocator.try_allocate(1) is None
    assert allocator.try_allocate(0).tolist() == []
    allocator.check()


@pytest.mark.parametrize("count", [-1, -(2**62)])
def test_a_negative_count_is_refused(count: int):
    with pytest.raises(NativeError, match="count: expected at least 0"):
        BlockAllocator(1).try_allocate(count)


@pytest.mark.parametrize("block_id", [-1, 1, 2**31 - 1])
def test_ref_count_of_no_block_is_refused(block_id: int):
    with pytest.raises(NativeError, match="no block"):
        BlockAllocator(1).ref_count(block_id)
