"""How much memory the bodies of requests take together while they are read and parsed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

SMALL_BYTES = 64 * 1024
"""Bodies up to this are not counted: the number of connections bounds them."""


class BodyMemory:
    """An allowance that bodies share. For one event loop."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self.num_bytes = 0

    @contextlib.contextmanager
    def share(self) -> Iterator[BodyMemoryShare]:
        """For one body; given back at the end."""
        share = BodyMemoryShare(self)
        try:
            yield share
        finally:
            self.num_bytes -= share.num_bytes

    def take(self, num_bytes: int) -> bool:
        if self.num_bytes + num_bytes > self._most:
            return False
        self.num_bytes += num_bytes
        return True


class BodyMemoryShare:
    """What one body has taken of it."""

    def __init__(self, memory: BodyMemory) -> None:
        self._memory = memory
        self.num_bytes = 0

    def grow(self, num_bytes: int) -> bool:
        """Take as much as a body of `num_bytes` needs; whether there was so much."""
        if num_bytes <= SMALL_BYTES:
            return True
        if not self._memory.take(num_bytes - self.num_bytes):
            return False
        self.num_bytes = num_bytes
        return True
