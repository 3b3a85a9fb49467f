"""How much memory a matcher holds: the library does not say, and keeps all that going back may need."""

from __future__ import annotations

import ctypes
from typing import Any

_FIRST_CHECK = 64
_GROWTH = 1.25
"""Between two checks, of the text: what a grammar keeps grows with its square or its cube at worst."""

_FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class _MallInfo(ctypes.Structure):
    """Source: mallinfo(3). The fields are of 32 bits and go over; differences of them are right."""

    _fields_ = [(name, ctypes.c_uint32) for name in _FIELDS.split()]


_mallinfo = ctypes.CDLL(None).mallinfo
_mallinfo.restype = _MallInfo


class MemoryCheck:
    """When to measure the matcher of an answer: more and more seldom, as the answer grows."""

    __slots__ = ("_next_check", "num_bytes")

    def __init__(self) -> None:
        self.num_bytes, self._next_check = 0, _FIRST_CHECK

    def saw(self, num_bytes: int) -> bool:
        """The matcher went on by so many bytes of text; whether it is to be measured."""
        self.num_bytes += num_bytes
        if self.num_bytes < self._next_check:
            return False
        self._next_check = int(self.num_bytes * _GROWTH)
        return True

    def is_over(self, handle: Any, most_bytes: int) -> bool:
        """Whether a matcher holds more than that. Cost: that of a copy of it, for a short while.

        Other threads may take memory meanwhile, but not each time.
        """
        return all(size_of(handle) > most_bytes for _ in range(3))


def size_of(handle: Any) -> int:
    """Bytes that a copy of a matcher takes, and what other threads take meanwhile."""
    before = _in_use()
    twin = handle.fork()
    size = (_in_use() - before) % 2**32
    del twin
    return size if size < 2**31 else 0  # others gave more back


def _in_use() -> int:
    info = _mallinfo()
    return info.hblkhd + info.uordblks
