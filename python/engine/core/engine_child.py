"""One engine process as its parent sees it: launched, reaped, and what it died of."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

import engine
from engine.config.engine_config import EngineConfig
from engine.core.frames import HEADER
from engine.core.step_board import StepBoard

ENGINE_COMMAND = (sys.executable, "-m", "engine.core.engine_process")
_FAULTS = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT})
_ONE_THREAD = {
    name: "1"
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
}
"""The engine's kernels bring their own threads; the pools of libraries would fight with them."""


class EngineChild:
    """Launches the process. It dies with the thread that launched it: the kernel sees to that.

    Raises: `OSError` when the machine cannot.
    """

    def __init__(self, config: EngineConfig, command: Sequence[str] = ENGINE_COMMAND) -> None:
        self.board = StepBoard()
        ours, theirs = socket.socketpair()
        self._socket: socket.socket | None = ours
        package_root = str(Path(engine.__file__).parent.parent)
        search_path = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        more = {"PYTHONPATH": os.pathsep.join(search_path), "TOKENIZERS_PARALLELISM": "false"}
        level = logging.getLevelName(logging.getLogger("engine").getEffectiveLevel()).lower()
        fds = theirs.fileno(), self.board.fd
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [*command, *map(str, fds), str(os.getpid()), level],
                    pass_fds=fds,
                    stdin=subprocess.DEVNULL,
                    env=os.environ | _ONE_THREAD | more,
                    start_new_session=True,  # a ctrl-C at the terminal is the server's to handle
                )
        except OSError:
            self.close()
            raise
        self.pid = self._process.pid
        body = msgspec.msgpack.encode(config)
        with contextlib.suppress(ConnectionError):  # it is dead already, as whoever reads will see
            ours.sendall(HEADER.pack(len(body)) + body)

    def kill(self) -> None:
        """Also ends a process that is stopped."""
        self._process.kill()

    @property
    def is_stopped(self) -> bool:
        """Whether a signal keeps the process from running."""
        try:
            state = Path(f"/proc/{self.pid}/stat").read_bytes().rpartition(b") ")[2][:1]
        except OSError:  # it is dead, or this system does not tell
            return False
        return state in (b"T", b"t")

    async def wait_gone(self) -> None:
        """Returns when the process is dead, which the connection may not show: others may hold its end."""
        loop, gone = asyncio.get_running_loop(), asyncio.Event()
        fd = os.pidfd_open(self.pid)
        loop.add_reader(fd, gone.set)
        try:
            await gone.wait()
        finally:
            loop.remove_reader(fd)
            os.close(fd)

    async def reap(self, patience_s: float) -> str:
        """Wait until the process is gone, then kill it; how it went, for a sentence."""
        process = self._process
        deadline = time.monotonic() + patience_s
        while process.poll() is None and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        if process.poll() is None:
            process.kill()
            process.wait()
        code = process.returncode
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"

    def suspects(self) -> list[str]:
        """Ids of the requests whose step killed the reaped process; none if anything else did."""
        code = self._process.returncode
        if code is None or -code not in _FAULTS or self.board.has_outside_fault:
            return []
        return self.board.step_request_ids

    def take_socket(self) -> socket.socket:
        """Our end of the connection; from now on the caller closes it."""
        ours, self._socket = self._socket, None
        assert ours is not None
        return ours

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self.board.close()
