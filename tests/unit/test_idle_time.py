"""What an engine does when there is nothing to do: a message waits for no more than a piece of it."""

from __future__ import annotations

import socket

from engine.core.engine_process import serve
from engine.core.frames import FrameReader, encode_frame
from engine.core.messages import FlushCache, Shutdown, ToServer
from engine.core.step_board import StepBoard
from unit.test_engine_core import make_core


def test_a_message_is_handled_between_two_pieces_of_idle_work():
    ours, theirs = socket.socketpair()
    pieces: list[str] = []

    def use_idle_time() -> bool:
        pieces.append("answered" if _has_data(ours) else "idle")
        if len(pieces) == 3:
            ours.sendall(encode_frame([FlushCache()]))
        if len(pieces) == 5:
            ours.sendall(encode_frame([Shutdown()]))
        return len(pieces) < 5

    core, _ = make_core()
    core.use_idle_time = use_idle_time
    with ours, theirs:
        serve(theirs, core, StepBoard())
        assert pieces == ["idle", "idle", "idle", "answered", "answered"]
        (answer,) = FrameReader(ToServer).feed(ours.recv(1 << 16))
    assert type(answer).__name__ == "CacheFlushed"


def _has_data(end: socket.socket) -> bool:
    end.setblocking(False)
    try:
        return bool(end.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False
    finally:
        end.setblocking(True)
