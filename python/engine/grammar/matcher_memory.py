"""How much memory a matcher holds: the library does not say, and keeps all that going back may need."""

from __future__ import annotations

import ctypes
from typing import Any

_FIRST_CHECK_S = 0.005
_GROWTH = 1.5
"""Between two checks, of the time that matching took: what takes memory takes time to write it."""

_FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class _MallInfo(ctypes.Structure):
    """Source: mallinfo(3). The fields are of 32 bits and go over; differences of them are right."""

    _fields_ = [(name, ctypes.c_uint32) for name in _FIELDS.split()]


_mallinfo = ctypes.CDLL(None).mallinfo
_mallinfo.restype = _MallInfo


class MemoryCheck:
    """When to measure the matcher of an answer: more and more seldom, as matching goes on."""

    __slots__ = ("_next_check_s", "_spent_s")

    def __init__(self) -> None:
        self._spent_s, self._next_check_s = 0.0, _FIRST_CHECK_S

    def spent(self, time_s: float) -> bool:
        """The matcher went on for so long, by the clock; whether it is to be measured."""
        self._spent_s += time_s
        if self._spent_s < self._next_check_s:
            return False
        self._next_check_s = self._spent_s * _GROWTH
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
