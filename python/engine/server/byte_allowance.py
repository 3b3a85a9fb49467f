"""How much memory large bodies take together while they are read, and large answers while they are sent."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

SMALL_BYTES = 64 * 1024
"""Up to this nothing is counted: the number of connections bounds them."""


class ByteAllowance:
    """What all bodies, or all answers, share. For one event loop."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self.num_bytes = 0

    @contextlib.contextmanager
    def share(self) -> Iterator[ByteShare]:
        """For one of them; given back at the end."""
        share = ByteShare(self)
        try:
            yield share
        finally:
            self.num_bytes -= share.num_bytes

    def take(self, num_bytes: int) -> bool:
        if self.num_bytes + num_bytes > self._most:
            return False
        self.num_bytes += num_bytes
        return True


class ByteShare:
    """What one of them has taken of it."""

    def __init__(self, allowance: ByteAllowance) -> None:
        self._allowance = allowance
        self.num_bytes = 0

    def grow(self, num_bytes: int) -> bool:
        """Take as much as `num_bytes` in all need; whether there was so much."""
        if num_bytes <= SMALL_BYTES:
            return True
        if not self._allowance.take(num_bytes - self.num_bytes):
            return False
        self.num_bytes = num_bytes
        return True
