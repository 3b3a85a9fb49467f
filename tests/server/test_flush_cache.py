"""GET and POST /flush_cache."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from helpers.http_server import DEADLINE_S, Server, wait_until


@pytest.fixture
def busy_server(server: Server) -> Iterator[Server]:
    """A request runs, and goes on when the engine is released."""
    server.call(server.engine.hold)
    thread = threading.Thread(target=server.chat)
    thread.start()
    wait_until(lambda: bool(server.call(lambda: server.engine.running)))
    yield server
    server.call(server.engine.release)
    thread.join(DEADLINE_S)


def flushes(server: Server) -> int:
    return server.call(lambda: server.engine.num_flushes)


def refused(response: httpx.Response) -> bool:
    return (response.status_code, response.json()["error"]["code"]) == (400, "requests_running")


def test_an_idle_engine_is_flushed(server: Server) -> None:
    before = flushes(server)
    assert server.get("/flush_cache").status_code == 200
    assert server.http.post("/flush_cache").status_code == 200
    assert server.post("/flush_cache", {"any": "body"}).status_code == 200
    assert server.post("/flush_cache?timeout=5", {}).status_code == 200
    assert flushes(server) == before + 4


def test_a_busy_engine_refuses(busy_server: Server) -> None:
    before = flushes(busy_server)
    assert refused(busy_server.http.post("/flush_cache"))
    start = time.monotonic()
    assert refused(busy_server.http.post("/flush_cache?timeout=0.1"))
    assert 0.1 <= time.monotonic() - start < DEADLINE_S
    assert flushes(busy_server) == before


def test_with_a_timeout_it_waits_until_the_engine_is_idle(busy_server: Server) -> None:
    before = flushes(busy_server)
    answers: list[httpx.Response] = []
    waiter = threading.Thread(
        target=lambda: answers.append(
            httpx.post(f"{busy_server.url}/flush_cache?timeout=60", timeout=2 * DEADLINE_S)
        )
    )
    waiter.start()
    assert refused(busy_server.http.post("/flush_cache?timeout=0.05"))
    busy_server.call(busy_server.engine.release)
    waiter.join(DEADLINE_S)
    assert answers[0].status_code == 200
    assert flushes(busy_server) == before + 1


@pytest.mark.parametrize("timeout", ["-1", "61", "nan", "inf", "1e400", "x", "", "1,5"])
def test_timeouts_are_bounded(server: Server, timeout: str) -> None:
    before = flushes(server)
    response = server.http.post(f"/flush_cache?timeout={timeout}")
    assert (response.status_code, response.json()["param"]) == (400, "timeout")
    assert flushes(server) == before
