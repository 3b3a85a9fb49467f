"""What only shows while an answer is on its way: admission, disconnects, silence, slow readers, the end."""

from __future__ import annotations

import gc
import json
import logging
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.config.server_config import ServerConfig
from engine.server.schema import ChatRequest
from helpers.engines import FakeStream
from helpers.http_server import DEADLINE_S, EOS, Server, sent_post, wait_until
from helpers.server_process import ServerProcess

CHAT = {"model": "default", "messages": [{"role": "user", "content": "x"}]}


def connection(server: Server, path: str, body: dict[str, Any]) -> AbstractContextManager[socket.socket]:
    return sent_post(server.url, path, body)


def read_until(opened: socket.socket, what: bytes) -> bytes:
    received = b""
    while what not in received:
        piece = opened.recv(65536)
        assert piece, received
        received += piece
    return received


@pytest.fixture
def held(server: Server) -> Iterator[Server]:
    """A server whose engine admits requests but makes no tokens until released."""
    server.call(server.engine.hold)
    yield server
    server.call(server.engine.release)


def running(server: Server) -> int:
    return server.call(lambda: len(server.engine.running))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reset", [False, True])
def test_a_vanished_client_frees_its_slot(
    held: Server, path: str, stream: bool, reset: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    body = {**CHAT, "prompt": ["x", "y"], "stream": stream}
    expected = 2 if path == "/v1/completions" else 1
    with connection(held, path, body) as opened:
        wait_until(lambda: running(held) == expected)
        if reset:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    wait_until(lambda: running(held) == 0)
    assert len(held.engine.cancelled) == expected
    wait_until(lambda: '"end":"cancelled"' in caplog.text)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_vanished_client_frees_its_slot_after_a_large_body(held: Server) -> None:
    # So large that the transport stops reading before the body is complete.
    body = {**CHAT, "metadata": "x" * 400_000}
    with connection(held, "/v1/chat/completions", body):
        wait_until(lambda: running(held) == 1)
    wait_until(lambda: running(held) == 0)


def test_a_conversation_is_not_kept_while_its_answer_runs(held: Server) -> None:
    body = {**CHAT, "chat_template_kwargs": {"unused": ["large"]}, "stream": True}
    with connection(held, "/v1/chat/completions", body) as opened:
        read_until(opened, b"data: ")
        gc.collect()
        kept = [thing for thing in gc.get_objects() if type(thing) is ChatRequest]
        assert kept
        assert not any(asked.messages or asked.template_variables for asked in kept)


def test_a_client_that_vanishes_in_the_middle_of_a_stream(server: Server) -> None:
    server.set_reply(lambda _request, _choice: [*server.ids("ab" * 900), EOS])
    server.call(server.engine.hold)
    with connection(server, "/v1/chat/completions", {**CHAT, "stream": True, "max_tokens": 1900}) as opened:
        read_until(opened, b'"role":"assistant"')
        wait_until(lambda: running(server) == 1)
    wait_until(lambda: running(server) == 0)
    server.call(server.engine.release)


def test_a_client_that_vanishes_while_waiting_for_admission(server: Server) -> None:
    server.call(server.engine.hold_admission)
    try:
        with connection(server, "/v1/chat/completions", CHAT):
            wait_until(lambda: len(server.engine.submitted) == 1)
            assert not server.engine.cancelled
        wait_until(lambda: len(server.engine.cancelled) >= 1)
    finally:
        server.call(server.engine.release_admission)


def test_no_status_line_before_admission_and_the_role_at_once_after(server: Server) -> None:
    server.call(server.engine.hold_admission)
    server.call(server.engine.hold)
    with connection(server, "/v1/chat/completions", {**CHAT, "stream": True}) as opened:
        wait_until(lambda: len(server.engine.submitted) == 1)
        opened.setblocking(False)
        with pytest.raises(BlockingIOError):
            opened.recv(1)
        opened.settimeout(DEADLINE_S)
        server.call(server.engine.release_admission)
        assert read_until(opened, b'"role":"assistant"').startswith(b"HTTP/1.1 200 ")
        server.call(server.engine.release)
        read_until(opened, b"data: [DONE]\n\n\r\n0\r\n\r\n")


@pytest.mark.parametrize(
    ("path", "fields", "first"),
    [
        ("/v1/chat/completions", {}, b'"role":"assistant"'),
        ("/v1/completions", {"prompt": "Echo", "echo": True}, b'"text":"Echo"'),
    ],
)
def test_what_comes_before_the_first_token_waits_for_it_on_request(
    held: Server, path: str, fields: dict[str, Any], first: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The status line and comments do not."""
    keep_alive_every(0.05, held, monkeypatch)
    options = {"stream": True, "stream_options": {"await_first_token": True}}
    with connection(held, path, {**CHAT, **fields, **options}) as opened:
        silence = read_until(opened, b": keep-alive")
        assert silence.startswith(b"HTTP/1.1 200 ") and b"data:" not in silence
        held.call(held.engine.release)
        said = read_until(opened, b"[DONE]").split(b"data: ")
        assert first in said[1] and not any(first in event for event in said[2:])


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_first_token_that_says_nothing_yet_keeps_no_headers_back(
    server: Server, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is there at once, and may be the beginning of a stop string."""
    is_there = iter([True])
    monkeypatch.setattr(FakeStream, "has_unread", property(lambda _: next(is_there, False)))
    server.set_reply("Hello")
    server.call(lambda: setattr(server.engine, "most_tokens", 1))
    body = {**CHAT, "prompt": "x", "stream": True, "stop": ["Hello\0"]}
    with connection(server, path, body) as opened:
        assert read_until(opened, b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")
        server.call(lambda: setattr(server.engine, "most_tokens", None))
        read_until(opened, b"data: [DONE]\n\n\r\n0\r\n\r\n")


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"messages": CHAT["messages"], "n": 8}),
        ("/v1/completions", {"prompt": [f"Once upon a time {i}" for i in range(8)]}),
    ],
)
def test_choices_that_grow_together_go_out_together(
    bundled: ServerProcess, path: str, fields: dict[str, Any]
) -> None:
    """One write a step, which is one chunk of the transfer."""
    body = {"model": "default", "max_tokens": 20, "ignore_eos": True, "stream": True, "seed": 1, **fields}
    whole = bundled.http.post(path, json={**body, "stream": False}).json()

    def count_writes() -> int:
        with sent_post(bundled.url, path, body) as opened:
            framed = read_until(opened, b"\r\n0\r\n\r\n").partition(b"\r\n\r\n")[2]
        texts = [""] * 8
        for event in re.findall(rb"data: ({.*})\n\n", framed):
            (choice,) = json.loads(event)["choices"]
            texts[choice["index"]] += choice.get("delta", choice).get("content", choice.get("text", ""))
        assert texts == [choice.get("text") or choice["message"]["content"] for choice in whole["choices"]]
        assert framed.count(b"data: ") > 8 * 12
        return len(re.findall(rb"(?:^|\r\n)[0-9a-f]+\r\n", framed)) - 1

    # What opens it, a write for each token, and the end with the last one; where the server was kept waiting
    # while it handed over the eight, they do not all begin in one step.
    assert any(count_writes() <= 20 + 4 for _ in range(10))


def test_no_event_waits_for_the_acknowledgement_of_another(held: Server) -> None:
    with connection(held, "/v1/chat/completions", {**CHAT, "stream": True}) as opened:
        read_until(opened, b"data: ")

        (served,) = held.connections
        end_point = served.transport.get_extra_info("socket")
        assert end_point.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


def keep_alive_every(seconds: float, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.context, "config", ServerConfig(sse_keep_alive_s=seconds))


def test_silence_is_filled_with_comments(held: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_alive_every(0.05, held, monkeypatch)
    with connection(held, "/v1/chat/completions", {**CHAT, "stream": True}) as opened:
        received = b""
        while received.count(b": keep-alive\n\n") < 3:
            received += opened.recv(65536)
        held.call(held.engine.release)
        received += read_until(opened, b"[DONE]")
    content = received.partition(b"\r\n\r\n")[2]
    for frame in content.split(b"\n\n"):
        assert b"keep-alive" not in frame or b"data:" not in frame


def test_the_sdk_does_not_mind_comments(held: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_alive_every(0.02, held, monkeypatch)
    timer = threading.Timer(0.2, lambda: held.call(held.engine.release))
    timer.start()
    stream = held.sdk().chat.completions.create(**CHAT, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "Hello there."
    timer.join()


def test_a_reader_that_stops_reading_is_cut_off(model_dir: Path) -> None:
    config = ServerConfig(sse_keep_alive_s=0.1, limit=("send_s=0.3",))
    with Server(model_dir, context_length=30_000, config=config) as server:
        server.set_reply(lambda _request, _choice: [65] * 20_000)
        body = {**CHAT, "stream": True, "max_tokens": 20_000, "logprobs": True, "top_logprobs": 20}
        with connection(server, "/v1/chat/completions", body) as opened:
            opened.recv(1, socket.MSG_PEEK)  # the answer begins
            wait_until(lambda: running(server) == 0)


def test_answers_interleave(server: Server) -> None:
    """Thirty requests at once, streams and not, each with its own text."""
    server.set_reply(lambda request, _choice: [*server.ids(server.prompt_text(request)[::-1]), EOS])
    answers: dict[int, str] = {}

    def ask(i: int) -> None:
        with httpx.Client(base_url=server.url, trust_env=False, timeout=DEADLINE_S) as client:
            body = {"model": "default", "prompt": f"<{i}>", "stream": i % 2 == 0}
            response = client.post("/v1/completions", json=body)
            if i % 2:
                answers[i] = response.json()["choices"][0]["text"]
                return
            frames = [line for line in response.text.split("\n\n") if line.startswith("data: {")]
            answers[i] = "".join(json.loads(f.removeprefix("data: "))["choices"][0]["text"] for f in frames)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {i: f"<{i}>"[::-1] for i in range(30)}


def test_stopping_lets_running_requests_end(model_dir: Path) -> None:
    server = Server(model_dir)
    with server:
        server.call(server.engine.hold)
        with connection(server, "/v1/chat/completions", {**CHAT, "stream": True}) as opened:
            wait_until(lambda: running(server) == 1)
            idle = socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE_S)
            wait_until(lambda: server.call(lambda: len(server.connections)) == 2)
            server.begin_stop()
            wait_until(lambda: server.get("/health").status_code == 503)
            refused = server.chat()
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert (refused.headers["x-should-retry"], refused.headers["connection"]) == ("false", "close")
            server.call(server.engine.release)
            read_until(opened, b"[DONE]")
            assert idle.recv(1) == b""
            wait_until(lambda: not server.is_listening)


def test_stopping_cuts_off_what_does_not_end(model_dir: Path) -> None:
    with Server(model_dir, drain_s=0.2) as server:
        server.call(server.engine.hold)
        with connection(server, "/v1/chat/completions", {**CHAT, "stream": True}) as opened:
            wait_until(lambda: running(server) == 1)
            server.begin_stop()
            with suppress(ConnectionResetError):
                while opened.recv(65536):
                    pass
    assert not server.engine.running


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/generate"])
def test_a_client_of_http_1_0_gets_a_stream_without_chunks(server: Server, path: str) -> None:
    body = {"text": "x", "stream": True} if path == "/generate" else {**CHAT, "prompt": "x", "stream": True}
    whole = server.post(path, body).text
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: {len(content)}\r\n\r\n"
    head, _, events = server.raw(head.encode() + content).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower() and b"connection: close" in head.lower()
    assert b"x-request-id: " in head and b"content-type: text/event-stream; charset=utf-8" in head
    assert events.endswith(b"data: [DONE]\n\n")
    assert events.count(b"data: ") == whole.count("data: ")
    assert server.chat().status_code == 200
