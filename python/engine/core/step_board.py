"""A page of memory that the engine's process writes and its supervisor reads, also when it is dead or stuck.

    bytes 0-7    ops begun, by native code                               (cpp/cpu/progress_board.h)
    bytes 8-11   number of the signal that the process dies of, 0: none  (likewise)
    bytes 12-15  1 if that signal was sent by another process            (likewise)
    bytes 16-23  turns of the engine's loop
    bytes 24-27  length of what follows: 0 outside of a step
    bytes 28-    ids of the requests in the step that is being computed, one a line

Each side has its own mapping, and words are written whole: nobody waits for anybody.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable

BOARD_BYTES = 1 << 20
_TURNS = struct.Struct("=Q")
_TURNS_AT = 16
_LENGTH = struct.Struct("=I")
_LENGTH_AT = 24
_IDS_AT = 28
_PROGRESS = struct.Struct("=QiiQ")
_FAULT_AT, _FAULT = 8, struct.Struct("=ii")


class StepBoard:
    """One mapping of the board. `fd` names it; the other process gets that and makes its own."""

    def __init__(self, fd: int | None = None) -> None:
        """Raises: `OSError` when there is no memory."""
        if fd is None:
            fd = os.memfd_create("engine-board")
            os.ftruncate(fd, BOARD_BYTES)
        self.fd = fd
        self._memory = mmap.mmap(fd, BOARD_BYTES)
        self._turns = 0

    def close(self) -> None:
        if not self._memory.closed:
            self._memory.close()
            os.close(self.fd)

    # --- the engine writes

    def turn(self) -> None:
        """The engine's loop went round."""
        self._turns += 1
        _TURNS.pack_into(self._memory, _TURNS_AT, self._turns)

    def begin_step(self, request_ids: Iterable[str]) -> None:
        """These requests are computed together. Ids that find no room are left out."""
        ids = "\n".join(request_ids).encode()[: BOARD_BYTES - _IDS_AT]
        self._memory[_IDS_AT : _IDS_AT + len(ids)] = ids
        _LENGTH.pack_into(self._memory, _LENGTH_AT, len(ids))

    def end_step(self) -> None:
        _LENGTH.pack_into(self._memory, _LENGTH_AT, 0)

    # --- the supervisor reads

    @property
    def progress(self) -> tuple[int, int]:
        """Changes whenever the engine gets on."""
        num_ops, _, _, num_turns = _PROGRESS.unpack_from(self._memory)
        return num_ops, num_turns

    @property
    def has_outside_fault(self) -> bool:
        """Whether the process dies of a signal that another process sent."""
        number, is_outside = _FAULT.unpack_from(self._memory, _FAULT_AT)
        return number != 0 and is_outside != 0

    @property
    def step_request_ids(self) -> list[str]:
        """Requests of the step that is being computed; empty between steps."""
        (length,) = _LENGTH.unpack_from(self._memory, _LENGTH_AT)
        ids = self._memory[_IDS_AT : _IDS_AT + min(length, BOARD_BYTES - _IDS_AT)]
        return ids.decode(errors="replace").split("\n") if ids else []
