"""Memory of the KV cache made present before a step needs it."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import threading
from collections.abc import Iterable, Sequence

import torch

THREAD_NAME = "pages ahead"
_PIECE_BYTES = 2 << 20
"""Of each tensor: a huge page."""
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, since Linux 5.14; what is there stays as it is


class PagesAhead:
    """Has the kernel make the pages of a cache present a piece before they are reached, in a thread.

    The kernel clears a page when it is touched first. On a virtual machine, which has to be given the page
    then, too, a huge page of every layer of a middling model takes a third of a second, and whoever is in
    that step waits for it. What nobody comes near stays absent.

    Shapes: `tensors` [N, ...], contiguous, of the same N blocks, which are used from the first one on.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], block_size: int) -> None:
        self._tensors = tensors
        self._piece_blocks = max(1, _PIECE_BYTES // tensors[0][0].nbytes)
        self._piece_slots = self._piece_blocks * block_size
        self._num_pieces = 1  # the first one belongs to the first step, which is only a trial
        self._next_at = self._piece_slots / 2

    def reach(self, slot_id: int) -> None:
        """A step writes to this slot and none behind it. Effects: may start a thread, which soon ends."""
        while slot_id >= self._next_at:
            first = self._num_pieces * self._piece_blocks
            self._num_pieces += 1
            self._next_at = (self._num_pieces - 0.5) * self._piece_slots  # in the middle of that piece
            if first >= len(self._tensors[0]):
                self._next_at = math.inf
                return
            blocks = [tensor[first : first + self._piece_blocks] for tensor in self._tensors]
            with contextlib.suppress(RuntimeError):  # no more threads: it can be done without
                threading.Thread(target=_populate, args=(blocks,), name=THREAD_NAME, daemon=True).start()


def _populate(tensors: Iterable[torch.Tensor]) -> None:
    libc = ctypes.CDLL(None)  # its calls let go of the interpreter's lock
    for begin, num_bytes in map(_pages, tensors):
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(num_bytes), _POPULATE_WRITE)  # only advice


def _pages(tensor: torch.Tensor) -> tuple[int, int]:
    """Address and bytes of the whole pages that hold it."""
    begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    return begin, tensor.data_ptr() + tensor.nbytes - begin
