"""What clients can make the server hold, and for how long: each bound is reached and kept."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.config.limits import Limits, parse_limits
from engine.config.server_config import ServerConfig
from engine.errors import ConfigError
from helpers.http_server import DEADLINE_S, Server, wait_until
from helpers.server_process import ServerProcess, command, write_llama

CHAT = "/v1/chat/completions"
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def small(model_dir: Path) -> Iterator[Server]:
    """Few connections."""
    config = ServerConfig(limit=("connections=4", "header_bytes=2000"))
    with Server(model_dir, config=config) as server:
        yield server


@pytest.fixture
def hasty(model_dir: Path) -> Iterator[Server]:
    """Little patience with slow connections."""
    with Server(model_dir, config=ServerConfig(limit=("receive_s=0.4", "idle-s=0.4"))) as server:
        yield server


def opened(server: Server, data: bytes = b"", *, receive_bytes: int | None = None) -> socket.socket:
    """`receive_bytes`: what the system holds of an answer that is not read, about."""
    connection = socket.socket()
    connection.settimeout(DEADLINE_S)
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.connect(("127.0.0.1", server.port))
    connection.sendall(data)
    return connection


def test_limits_are_read() -> None:
    limits = parse_limits(["body_bytes=10", " send-s =0.5", "connections=7"])
    assert (limits.body_bytes, limits.send_s, limits.connections) == (10, 0.5, 7)
    assert parse_limits([]) == Limits()


def test_the_readme_lists_them_all() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert all(f"| `{field.name}` |" in readme for field in dataclasses.fields(Limits))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("body_byte=1", "no limit is called 'body_byte'; did you mean body_bytes?"),
        ("xyz=1", "no limit is called 'xyz'; there are body_bytes, "),
        ("idle_s", "idle_s expects a number after =, got 'idle_s'"),
        ("connections=1.5", "connections expects a number after =, got '1.5'"),
        ("connections=0", "connections must be positive, got 0"),
        ("idle_s=nan", "idle_s must be positive, got nan"),
        ("idle_s=inf", "idle_s must be positive, got inf"),
        ("header_bytes=20000", "header_bytes must be positive and at most 16384, got 20000"),
    ],
)
def test_wrong_limits(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ServerConfig(limit=(text,))
    assert message in caught.value.message


def test_an_idle_connection_makes_room_for_a_new_one(small: Server) -> None:
    small.call(small.engine.hold)
    body = b'{"model":"default","messages":[{"role":"user","content":"x"}]}'
    head = b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (CHAT.encode(), len(body))
    busy = opened(small, head + body)
    wait_until(lambda: small.call(lambda: len(small.engine.running)) == 1)
    idle = []
    for _ in range(3):
        idle.append(opened(small, HEALTH))
        assert idle[-1].recv(65536).startswith(b"HTTP/1.1 200")
    another = opened(small, HEALTH)
    assert another.recv(65536).startswith(b"HTTP/1.1 200")
    assert idle[0].recv(1) == b"", "the one that was idle for longest is closed"
    small.call(small.engine.release)
    assert busy.recv(65536).startswith(b"HTTP/1.1 200")
    for connection in (busy, another, *idle):
        connection.close()


def test_one_connection_too_many_is_refused(small: Server) -> None:
    small.call(small.engine.hold)
    body = {"model": "default", "messages": [{"role": "user", "content": "x"}]}
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        answers = [threads.submit(small.sdk().chat.completions.create, **body) for _ in range(4)]
        wait_until(lambda: small.call(lambda: len(small.engine.running)) == 4)
        with opened(small) as extra:
            refused = b"".join(iter(lambda: extra.recv(65536), b""))
        head, _, content = refused.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ") and b"\r\nretry-after: 1\r\n" in head
        assert json.loads(content)["error"]["code"] == "too_many_connections"
        small.call(small.engine.release)
        assert all(answer.result(DEADLINE_S).choices for answer in answers)


def test_connections_that_come_in_one_turn_of_the_loop(
    small: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """Each must know at once whether it is idle: the one after it may ask."""
    go_on = threading.Event()
    small.loop.call_soon_threadsafe(go_on.wait)
    opened_at_once = [opened(small) for _ in range(40)]  # the system accepts them meanwhile
    go_on.set()
    wait_until(lambda: small.call(lambda: len(small.connections)) <= 4)
    for connection in opened_at_once[:-4]:
        assert connection.recv(1) == b"", "the first ones were idle for longest"
    for connection in opened_at_once[-4:]:
        connection.sendall(HEALTH)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    for connection in opened_at_once:
        connection.close()
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


def test_there_are_never_more_connections_than_the_system_allows(tmp_path: Path) -> None:
    """With room for 256 open files and 300 clients who stay, there is still an answer for another."""
    write_llama(tmp_path)
    program = ["sh", "-c", 'ulimit -n 256; exec "$@"', "sh", *command()]
    with ServerProcess("--model-path", str(tmp_path), "--load-format", "dummy", program=program) as server:
        server.wait_ready()
        port = int(server.url.rsplit(":", 1)[1])
        staying = [socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S) for _ in range(300)]
        for connection in staying[-50:]:
            connection.sendall(HEALTH)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        for _ in range(20):
            assert httpx.get(f"{server.url}/health", trust_env=False).status_code == 200
        for connection in staying:
            connection.close()
        assert server.stop() == 0
    assert "leaves room for 96 connections at once, not 4096; see ulimit -Hn" in server.log
    assert "out of system resource" not in server.log and "Traceback" not in server.log


def test_headers_that_drip_do_not_hold_a_connection(hasty: Server) -> None:
    with opened(hasty, b"GET /health HTTP/1.1\r\n") as connection:
        connection.settimeout(0.05)
        answer, num_drops = b"", 0
        while not answer:
            num_drops += 1
            assert num_drops < 1000, "each drop bought more time"
            connection.sendall(b"x: y\r\n")
            try:
                answer = connection.recv(65536)
            except TimeoutError:
                continue
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"request_timeout"' in answer


def test_an_idle_connection_is_closed(hasty: Server) -> None:
    with opened(hasty) as unused:
        assert unused.recv(1) == b""
    for _ in range(10):
        with opened(hasty, HEALTH) as used:
            if answer := used.recv(65536):  # else this test was too slow with its question
                assert answer.startswith(b"HTTP/1.1 200")
                assert used.recv(1) == b""
                return
    pytest.fail("it was closed before it was answered")


def test_headers_that_are_too_large(small: Server) -> None:
    with opened(small, b"GET /health HTTP/1.1\r\nx: " + b"y" * 3000 + b"\r\n\r\n") as connection:
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_bodies_share_their_memory(server: Server) -> None:
    """Two large bodies fit, the third is refused until one of them is gone; small ones always fit."""
    server.call(lambda: setattr(server.context.body_memory, "_most", 500_000))
    half = b'{"model": "default", "prompt": "' + b"x" * 200_000
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 300000\r\n\r\n"
    held = [opened(server, head + half) for _ in range(2)]
    wait_until(lambda: server.call(lambda: server.context.body_memory.num_bytes) > 390_000)
    huge = {"model": "default", "prompt": "x" * 200_000, "max_tokens": 1}
    refused = server.post("/v1/completions", huge)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "bodies_too_large")
    assert server.complete(max_tokens=1).status_code == 200
    for connection in held:
        connection.close()
    wait_until(lambda: server.call(lambda: server.context.body_memory.num_bytes) == 0)
    assert server.post("/v1/completions", huge).json()["error"]["code"] == "context_length_exceeded"
    server.call(lambda: setattr(server.context.body_memory, "_most", Limits().all_bodies_bytes))


def large_answers(model_dir: Path, **config: Any) -> Server:
    server = Server(model_dir, context_length=10_000, config=ServerConfig(**config))
    server.set_reply(lambda _request, _choice: [65] * 4000)
    return server


def ask_for_a_large_answer(server: Server, **options: int) -> socket.socket:
    """Some 4 MB, of which the system holds little for who reads nothing."""
    content = {"model": "default", "messages": [{"role": "user", "content": "x"}]}
    body = json.dumps(content | {"max_tokens": 4000, "logprobs": True, "top_logprobs": 20}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    return opened(server, head.encode() + body, **options)


def read_answer(connection: socket.socket) -> bytes:
    """All until the server closes the connection."""
    with connection:
        return b"".join(iter(lambda: connection.recv(1 << 20), b""))


def test_answers_share_their_memory(model_dir: Path) -> None:
    """Two large answers wait for clients that read nothing, the next is refused until one of them is gone."""
    with large_answers(model_dir) as server:
        whole = read_answer(ask_for_a_large_answer(server))
        size = len(whole)
        assert whole.startswith(b"HTTP/1.1 200") and size > 3_000_000
        server.call(lambda: setattr(server.context.answer_memory, "_most", size * 5 // 2))
        held = [ask_for_a_large_answer(server, receive_bytes=4096) for _ in range(2)]
        wait_until(lambda: server.call(lambda: server.context.answer_memory.num_bytes) > size * 3 // 2)
        refused = read_answer(ask_for_a_large_answer(server))
        assert refused.startswith(b"HTTP/1.1 503 ") and b'"answers_too_large"' in refused
        assert server.complete(max_tokens=1).status_code == 200
        held[0].close()
        assert len(read_answer(held[1])) == size, "who reads late gets all of it"
        wait_until(lambda: server.call(lambda: server.context.answer_memory.num_bytes) == 0)
        assert len(read_answer(ask_for_a_large_answer(server))) == size


def test_who_stops_reading_a_large_answer_is_cut_off(model_dir: Path) -> None:
    with large_answers(model_dir, limit=("send_s=0.3",)) as server:
        with ask_for_a_large_answer(server, receive_bytes=4096) as connection:
            connection.recv(1, socket.MSG_PEEK)  # it begins
            wait_until(lambda: server.call(lambda: len(server.connections)) == 0)
            with contextlib.suppress(ConnectionResetError):
                assert len(read_answer(connection)) < 3_000_000, "it had all of it"
        assert server.call(lambda: server.context.answer_memory.num_bytes) == 0


# --- time


def test_waiting_too_long_is_refused_before_any_header(model_dir: Path) -> None:
    with Server(model_dir, config=ServerConfig(queue_timeout=0.2)) as server:
        server.call(server.engine.hold_admission)
        for stream in (False, True):
            refused = server.chat(stream=stream)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_timeout")
            assert refused.headers["retry-after"] == "7", "the engine's estimate"
        assert len(set(server.engine.cancelled)) == 2
        server.call(server.engine.release_admission)
        assert server.chat().status_code == 200


def test_a_request_that_takes_too_long_is_ended(model_dir: Path) -> None:
    with Server(model_dir, config=ServerConfig(request_timeout=0.3)) as server:
        server.call(server.engine.hold)
        whole = server.chat()
        assert (whole.status_code, whole.json()["error"]["code"]) == (503, "request_timeout")
        assert whole.headers["x-should-retry"] == "false"
        server.wait_idle()
        stream = server.chat(stream=True)
        assert stream.status_code == 200
        *_, error, done, end = stream.text.split("\n\n")
        assert '"code":"request_timeout"' in error
        assert (done, end) == ("data: [DONE]", "")
        server.wait_idle()
        assert server.call(lambda: server.context.live._aborts) == {}


def test_time_in_the_queue_counts_too(model_dir: Path) -> None:
    with Server(model_dir, config=ServerConfig(request_timeout=0.2)) as server:
        server.call(server.engine.hold_admission)
        assert server.chat(stream=True).json()["error"]["code"] == "request_timeout"
        assert len(set(server.engine.cancelled)) == 1


@pytest.mark.slow
def test_an_answer_that_takes_over_a_minute_arrives(server: Server) -> None:
    """Whole or streamed: no time-out of the framework is left that would cut it."""
    server.call(server.engine.hold)
    timer = threading.Timer(65, lambda: server.call(server.engine.release))
    timer.start()
    with httpx.Client(base_url=server.url, timeout=120, trust_env=False) as client:
        body = {"model": "default", "prompt": "x"}
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            asked = [
                threads.submit(client.post, "/v1/completions", json={**body, "stream": stream})
                for stream in (False, True)
            ]
            whole, streamed = (answer.result() for answer in asked)
    timer.join()
    assert whole.status_code == streamed.status_code == 200
    assert whole.json()["choices"][0]["finish_reason"] == "stop"
    assert streamed.text.endswith("data: [DONE]\n\n")


def test_a_client_that_asks_on_and_reads_nothing_is_cut_off(model_dir: Path) -> None:
    with Server(model_dir, config=ServerConfig(limit=("send_s=0.3",))) as server:
        with opened(server, b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 1000) as connection:
            connection.recv(1, socket.MSG_PEEK)  # the answers begin
            wait_until(lambda: server.call(lambda: len(server.connections)) == 0)
        assert server.get("/health").status_code == 200
