"""Clients that ask for a stream and do not read it: what they may hold, and that nobody else notices."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from helpers.crowd import Outcome, ask, client, completion, metrics
from helpers.http_server import DEADLINE_S, Server, wait_until
from helpers.server_process import ServerProcess

LONG = {"model": "default", "messages": [{"role": "user", "content": "x"}], "stream": True}
LARGE = {"logprobs": True, "top_logprobs": 20}
"""Makes some 1.5 kB of each token, so that what the system holds for a connection is soon full."""


class SlowReader:
    """Has sent its request, and takes nothing of the answer until `read_on`."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
        at = httpx.URL(url)
        self._socket = socket.socket()
        self._socket.settimeout(DEADLINE_S)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.connect((at.host, at.port))
        self._socket.sendall(head.encode() + b"Connection: close\r\n\r\n" + content)

    def __enter__(self) -> SlowReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def read_on(self) -> bytes:
        """All that comes until the server closes the connection."""
        return b"".join(iter(lambda: self._socket.recv(1 << 20), b""))


def blocked(server: Server) -> list[int]:
    """Bytes that wait in the server for each client who takes none."""

    def look() -> list[int]:
        slow = [connection for connection in server.connections if not connection._can_write.is_set()]
        return [connection.transport.get_write_buffer_size() for connection in slow]

    return server.call(look)


def test_each_token_reaches_the_others_at_once(model_dir: Path) -> None:
    """Whatever a slow reader makes the server wait for, nobody else's token waits for it: the engine makes
    the next ones only once all the others have the last ones.
    """

    def allow(num_tokens: int) -> None:
        server.call(lambda: setattr(server.engine, "most_tokens", num_tokens))

    def contents(number: int) -> Iterator[None]:
        body = {**LONG, "max_tokens": 100, "user": str(number)}
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, trust_env=False) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                    yield

    with Server(model_dir, context_length=30_000) as server:
        server.set_reply(lambda _request, _choice: [65] * 20_000)
        with SlowReader(server.url, {**LONG, **LARGE, "max_tokens": 20_000}):
            wait_until(lambda: len(blocked(server)) == 1)
            allow(0)
            others = [contents(i) for i in range(5)]
            for num_tokens in range(1, 101):
                allow(num_tokens)
                for other in others:
                    next(other)
                assert all(num_bytes < 200_000 for num_bytes in blocked(server))
            assert all(list(other) == [] for other in others), "each token came as an event of its own"
            assert len(blocked(server)) == 1, "it has been slow all the time"
            assert server.call(lambda: len(server.engine.running)) == 1
        server.wait_idle()


def test_the_engine_stops_working_for_who_falls_behind() -> None:
    """Long before it is done, and before the connection is cut off; others get what they get alone."""
    flags = ("--max-running-requests", "16", "--num-threads", "2", "--limit", "unread_tokens=50")
    bodies = [completion(f"Number {i} says", 100, stream=i % 2 == 0, logprobs=1) for i in range(4)]

    async def answers(url: str) -> list[Outcome]:
        async with client(url) as http:
            return list(await asyncio.gather(*(ask(http, body) for body in bodies)))

    with ServerProcess(*flags) as server:
        server.wait_ready()
        expected = asyncio.run(answers(server.url))
        deep = {**LONG, **LARGE, "n": 4, "max_tokens": 1500, "ignore_eos": True}
        num_requests = metrics(server.http)["engine:num_requests_total"]
        slow = [SlowReader(server.url, {**deep, "seed": i}) for i in range(3)]
        wait_until(lambda: metrics(server.http)["engine:num_requests_total"] == num_requests + 3)
        got = asyncio.run(answers(server.url))
        assert [outcome.answer for outcome in got] == [outcome.answer for outcome in expected]
        wait_until(lambda: _load(server)["num_running_reqs"] == 0)
        for reader in slow:
            with reader:
                *events, error, done = reader.read_on().split(b"data: ")[1:]
                assert b'"code":"slow_reader"' in error and done.startswith(b"[DONE]")
                assert len(events) < 4 * deep["max_tokens"] / 2
        samples = metrics(server.http)
        assert samples['engine:cancelled_total{cause="slow_reader"}'] == 3
        assert server.stop() == 0
    assert "Traceback" not in server.log


def _load(server: ServerProcess) -> dict[str, int]:
    return server.http.get("/v1/loads").json()["aggregate"]
