"""The engine's own process: `python -m engine.core.engine_process FD BOARD_FD PARENT_PID LOG_LEVEL`.

Started by `core.engine_child`, never by hand. FD is one end of a socket pair; the first frame holds
the configuration, then messages go both ways. End of file on it means that the parent is gone.
BOARD_FD is the memory where the supervisor looks for progress (`core.step_board`).
"""

from __future__ import annotations

import faulthandler
import logging
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable

import msgspec

from engine._native import ProgressBoard
from engine.config.engine_config import EngineConfig
from engine.core.engine_core import EngineCore
from engine.core.frames import HEADER, FrameReader, checked_length, encode_frame
from engine.core.garbage import spare_what_lives
from engine.core.messages import EngineFailed, EngineReady, Progress, Shutdown, ToEngine, ToServer
from engine.core.step_board import StepBoard
from engine.errors import DeviceLost, EngineError
from engine.log import set_up_logging
from engine.parent_death import die_with_parent

logger = logging.getLogger("engine.core.engine_process")  # run as a program, __name__ says "__main__"

Build = Callable[[EngineConfig, Callable[[str, float], None], StepBoard], tuple[EngineCore, EngineReady]]

_READ_BYTES = 1 << 20
_PROGRESS_INTERVAL_S = 0.1
_WARM_UP_AFTER_S = 2.0
"""An engine that is idle so long after its start prepares for constraints."""


def main(argv: list[str]) -> int:
    fd, board_fd, parent_pid, log_level = *map(int, argv[:3]), argv[3]
    die_with_parent(parent_pid)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a manager of services sends it to all: the parent drains
    # Its memory is large: writing that to a file would hold up the news of its death.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    set_up_logging(log_level)
    faulthandler.enable(all_threads=False)  # says in which line native code died
    ProgressBoard(board_fd).note_faults()
    with socket.socket(fileno=fd) as connection:
        return run(connection, StepBoard(board_fd), _build)


def run(connection: socket.socket, board: StepBoard, build: Build) -> int:
    """Load, report, serve until the other side goes. Returns the exit code."""
    try:
        core, ready = build(receive_config(connection), _reporter(connection), board)
    except EngineError as error:
        connection.sendall(encode_frame([EngineFailed(error.message, error.slug)]))
        return 1
    except ConnectionError:
        return 1
    except Exception as error:
        logger.exception("the engine could not start")
        reason = " ".join(str(error).split())[:300]
        message = f"the engine could not start: {type(error).__name__}: {reason}"
        connection.sendall(encode_frame([EngineFailed(message, "internal_error")]))
        return 1
    spare_what_lives()
    began_cpu_s = time.thread_time()
    try:
        connection.sendall(encode_frame([ready]))
        awake_s = serve(connection, core, board)
    except ConnectionError:
        logger.info("the server is gone")
    except DeviceLost as error:
        # As native code dies of a fault: the requests of the step are told, and suspected.
        logger.critical("%s; the engine process ends, to be started again", error.message)
        os.abort()
    else:
        _log_totals(core, awake_s, time.thread_time() - began_cpu_s)
    return 0


def serve(connection: socket.socket, core: EngineCore, board: StepBoard) -> float:
    """Step while there is work, sleep while there is none; return on `Shutdown` or end of file.

    A reader that does not keep up holds the engine up: nothing piles up in between. Returns how
    long it was awake, in seconds.
    """
    began_s = time.monotonic()
    asleep_s = 0.0

    def send(messages: list[ToServer]) -> None:
        connection.sendall(encode_frame(messages))

    reader = FrameReader(ToEngine)
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    if core.wake_fd is not None:
        poll.register(core.wake_fd, select.POLLIN)
    warm_up_at_s: float | None = began_s + _WARM_UP_AFTER_S
    while True:
        board.turn()
        if not core.has_work and not core.use_idle_time():
            lay_down_s = time.monotonic()
            if warm_up_at_s is not None and lay_down_s >= warm_up_at_s:
                core.warm_up()
                warm_up_at_s = None
            poll.poll(None if warm_up_at_s is None else 1e3 * (warm_up_at_s - lay_down_s))
            slept_s = time.monotonic() - lay_down_s
            asleep_s += slept_s
            if core.cpu_clock is not None:
                core.cpu_clock.slept_s += slept_s
        if any(fd == connection.fileno() for fd, _ in poll.poll(0)):
            data = connection.recv(_READ_BYTES)
            messages = reader.feed(data)
            if not data or any(isinstance(message, Shutdown) for message in messages):
                return time.monotonic() - began_s - asleep_s
            for message in messages:
                core.handle(message)
        if messages := core.step(announce=send):
            send(messages)


def _log_totals(core: EngineCore, awake_s: float, cpu_s: float) -> None:
    """The last words. Times are of this thread; the first two by the clock."""
    stats = core.stats()
    logger.info(
        "served %d tokens in %d steps: %.4f s in the model, %.4f s around it; %.4f s of CPU time",
        stats.output_tokens,
        stats.num_steps,
        stats.model_s,
        awake_s - stats.model_s,
        cpu_s,
    )


def receive_config(connection: socket.socket) -> EngineConfig:
    """The first frame. Raises: `ConnectionError` when the other side is gone."""
    (length,) = HEADER.unpack(_receive_exactly(connection, HEADER.size))
    body = _receive_exactly(connection, checked_length(length))
    return msgspec.msgpack.decode(body, type=EngineConfig)


def _receive_exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise ConnectionError("the server is gone")
        data += piece
    return data


def _reporter(connection: socket.socket) -> Callable[[str, float], None]:
    """Sends progress, but not more often than somebody could want to read it."""
    last = ("", -_PROGRESS_INTERVAL_S)

    def report(stage: str, fraction: float) -> None:
        nonlocal last
        now = time.monotonic()
        if stage != last[0] or fraction >= 1 or now - last[1] >= _PROGRESS_INTERVAL_S:
            last = (stage, now)
            connection.sendall(encode_frame([Progress(stage, fraction)]))

    return report


def _build(
    config: EngineConfig, progress: Callable[[str, float], None], board: StepBoard
) -> tuple[EngineCore, EngineReady]:
    from engine.core.build import build_engine

    return build_engine(config, progress, board)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
