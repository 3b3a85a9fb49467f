"""The server's end of the socket to the engine."""

from __future__ import annotations

import asyncio
import socket

import pytest

from engine.core import connection
from engine.core.connection import EngineConnection
from engine.core.frames import FrameReader
from engine.core.messages import CancelRequest, ToEngine


def test_what_is_said_in_a_long_turn_does_not_wait_for_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    frames = FrameReader(ToEngine)

    def arrived() -> list[str]:
        try:
            return [message.request_id for message in frames.feed(theirs.recv(1 << 16))]
        except BlockingIOError:
            return []

    async def run() -> None:
        engine = EngineConnection()
        talk = asyncio.create_task(anext(engine.receive(ours), None))
        await asyncio.sleep(0.01)

        def say(*names: str) -> list[str]:
            for name in names:
                engine.send(CancelRequest(name))
            return arrived()

        assert say("a") == ["a"], "after a while of silence"
        monkeypatch.setattr(connection, "_HOLD_S", 60)
        assert say("b", "c") == []
        await asyncio.sleep(0)
        assert arrived() == ["b", "c"], "at the end of the turn"
        monkeypatch.setattr(connection, "_HOLD_S", 0)
        assert say("d") == ["d"]
        engine.close()
        await talk

    with theirs:
        asyncio.run(run())
