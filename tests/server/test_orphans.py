"""No process outlives the one that started it: engine, grammar helper and its trials, whoever is killed."""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
from collections.abc import Iterator

import httpx
import psutil
import pytest

from helpers.constrained_chat import endless_regex
from helpers.http_server import DEADLINE_S, wait_until
from helpers.server_process import ServerProcess, assert_gone

FLAGS = (
    *("--grammar-timeout", "60", "--drain-timeout", "1"),
    *("--max-total-tokens", "2048", "--num-threads", "1"),
)
_numbers = itertools.count()


def family(server: ServerProcess) -> list[psutil.Process]:
    """Engine, helper and trial, each the child of the one before. The trial is stopped and does not end."""

    def look() -> bool:
        found.clear()
        with contextlib.suppress(psutil.NoSuchProcess, ValueError):  # one is not there yet, or no longer
            parent = server.process.pid
            for _ in range(3):
                (child,) = psutil.Process(parent).children()
                found.append(child)
                parent = child.pid
            helper, trial = found[1:]
            # What a library runs as it is imported is a child too, and soon over: a trial is a fork of the
            # helper. One that compiles has asked to die with its parent: stopped before that it could not.
            if trial.cmdline() == helper.cmdline() and trial.cpu_times().user > 0.05:
                trial.suspend()
                return True
        return False

    def ask() -> None:
        body = {
            "model": "default",
            "messages": [{"role": "user", "content": "Hi"}],
            "regex": endless_regex(str(next(_numbers))),
        }
        with contextlib.suppress(httpx.TransportError):
            httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=DEADLINE_S, trust_env=False)

    found: list[psutil.Process] = []
    threading.Thread(target=ask, daemon=True).start()
    wait_until(look)
    return found


@pytest.fixture
def heeded_signals() -> Iterator[None]:
    """Nohup and background jobs ignore signals, and what they start inherits that."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGQUIT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("heeded_signals")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGQUIT, signal.SIGHUP])
def test_no_process_outlives_the_server(number: signal.Signals) -> None:
    with ServerProcess(*FLAGS) as server:
        server.wait_ready()
        children = family(server)
        if number is signal.SIGKILL:  # those that are stopped do not live on either
            for child in children[:-1]:
                child.suspend()
        server.process.send_signal(number)
        assert server.process.wait(DEADLINE_S) == -number
        assert_gone(children)


def test_no_process_outlives_the_engine_or_the_helper() -> None:
    with ServerProcess(*FLAGS) as server:
        for number in (signal.SIGKILL, signal.SIGSEGV):
            server.wait_ready()
            engine, helper, trial = family(server)
            helper.send_signal(number)
            assert_gone([helper, trial])
            assert engine.is_running() and server.http.get("/health").status_code == 200
        for number in (signal.SIGKILL, signal.SIGABRT):
            server.wait_ready()
            engine, *others = family(server)
            engine.send_signal(number)
            assert_gone([engine, *others])
        server.wait_ready()
        children = family(server)
        for child in children:  # who is stopped cannot be asked to end
            child.suspend()
        assert server.stop() == 0
        assert_gone(children)
    assert "Traceback" not in server.log
