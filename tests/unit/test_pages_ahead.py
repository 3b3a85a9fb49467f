"""Memory that is made present before it is used."""

from __future__ import annotations

import mmap
import struct
import threading
from pathlib import Path

import pytest
import torch

from engine.runner import pages_ahead
from engine.runner.pages_ahead import PagesAhead

BLOCK_SIZE, BLOCK_BYTES = 16, 1 << 15
PIECE = (2 << 20) // BLOCK_BYTES
"""Blocks of a huge page."""
NUM_BLOCKS = 4 * PIECE + 5


@pytest.fixture
def tensors() -> list[torch.Tensor]:
    """Of blocks whose memory nobody has touched."""
    memories = [mmap.mmap(-1, NUM_BLOCKS * BLOCK_BYTES, mmap.MAP_PRIVATE) for _ in range(2)]
    return [torch.frombuffer(memory, dtype=torch.int16).view(NUM_BLOCKS, -1) for memory in memories]


def wait_for_threads() -> None:
    for thread in threading.enumerate():
        if thread.name == pages_ahead.THREAD_NAME:
            thread.join()


def present(tensor: torch.Tensor) -> list[bool]:
    """Of each block, whether the page where it begins is present."""
    addresses = [block.data_ptr() // mmap.PAGESIZE for block in tensor]
    with Path("/proc/self/pagemap").open("rb") as pages:
        entries = [(pages.seek(8 * address), pages.read(8))[1] for address in addresses]
    return [bool(struct.unpack("<Q", entry)[0] >> 63) for entry in entries]


def pieces(tensor: torch.Tensor) -> list[bool]:
    """Of each piece, whether all its blocks are present; none must be in part."""
    flags = present(tensor)
    found = [set(flags[first : first + PIECE]) for first in range(0, NUM_BLOCKS, PIECE)]
    assert all(len(flags) == 1 for flags in found)
    return [flags == {True} for flags in found]


def test_a_piece_is_there_before_it_is_reached_and_not_much_before(tensors: list[torch.Tensor]) -> None:
    slots = PIECE * BLOCK_SIZE

    def after(slot_id: int) -> list[bool]:
        ahead.reach(slot_id)
        wait_for_threads()
        assert pieces(tensors[0]) == pieces(tensors[1])
        return pieces(tensors[0])

    ahead = PagesAhead(tensors, BLOCK_SIZE)
    assert after(slots // 2 - 1) == [False] * 5, "nobody may ever come so far"
    assert after(slots // 2) == [False, True, False, False, False]
    assert after(3) == [False, True, False, False, False]
    assert after(2 * slots + 1) == [False, True, True, False, False], "a step may leap"
    assert after(NUM_BLOCKS * BLOCK_SIZE - 1) == [False, True, True, True, True]


def test_what_was_written_stays(tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        tensor[-1].fill_(7)
        tensor[0].fill_(9)
    PagesAhead(tensors, BLOCK_SIZE).reach(NUM_BLOCKS * BLOCK_SIZE - 1)
    wait_for_threads()
    for tensor in tensors:
        assert (tensor[-1] == 7).all() and (tensor[0] == 9).all() and not tensor[1:-1].any()


def test_a_system_without_threads_or_without_that_advice_is_no_error(
    tensors: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        PagesAhead(tensors, BLOCK_SIZE).reach(NUM_BLOCKS * BLOCK_SIZE - 1)
    monkeypatch.setattr(pages_ahead, "_POPULATE_WRITE", 9999)
    PagesAhead(tensors, BLOCK_SIZE).reach(NUM_BLOCKS * BLOCK_SIZE - 1)
    wait_for_threads()
    assert not any(present(tensors[0]))
