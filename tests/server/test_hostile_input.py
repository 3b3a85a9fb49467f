"""Bytes that no well-behaved client sends, below JSON: each gets one clear answer, and the server lives on.

Wrong bodies, fields, methods and paths are in test_refusals.py.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest

from helpers.http_server import DEADLINE_S, Server, events_of, wait_until

CHAT = "/v1/chat/completions"
GOOD = json.dumps({"model": "default", "messages": [{"role": "user", "content": "x"}]}).encode()
JSON = {"content-type": "application/json"}


@pytest.fixture(autouse=True)
def _still_alive(server: Server) -> Iterator[None]:
    yield
    assert server.chat().status_code == 200


def send(server: Server, content: bytes, **headers: str) -> httpx.Response:
    return server.http.post(CHAT, content=content, headers={**JSON, **headers})


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON"])
def test_ways_to_say_json(server: Server, kind: str) -> None:
    assert send(server, GOOD, **{"content-type": kind}).status_code == 200


def test_no_media_type_counts_as_json(server: Server) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(GOOD)}\r\n\r\n"
    assert server.raw(head.encode() + GOOD).startswith(b"HTTP/1.1 200 ")


def test_a_body_that_is_too_large(server: Server) -> None:
    server.set_limits(body_bytes=10_000)
    huge = json.dumps({"model": "default", "prompt": "x" * 3_000_000}).encode()
    response = send(server, huge)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
    chunked = server.http.post(CHAT, content=iter([huge[:5000]] * 50), headers=JSON)
    assert (chunked.status_code, chunked.json()["error"]["code"]) == (413, "body_too_large")
    assert send(server, GOOD).status_code == 200


def test_a_body_announced_as_huge_is_not_waited_for(server: Server) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n{{"
    with socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE_S) as connection:
        connection.sendall(head.encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_stops_coming(server: Server) -> None:
    server.set_limits(receive_s=0.1)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{{"
    with socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE_S) as connection:
        connection.sendall(head.encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 408 ")


def test_a_chunked_body(server: Server) -> None:
    pieces = iter([GOOD[i : i + 7] for i in range(0, len(GOOD), 7)])
    assert server.http.post(CHAT, content=pieces, headers=JSON).status_code == 200


@pytest.mark.parametrize(
    "data",
    [
        b"GARBAGE\r\n\r\n",
        b"\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET  / HTTP/1.1\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"CONNECT host:1 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon here\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nxxxxx",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET /health HTTP/1.1\r\nx: " + b"y" * 20_000 + b"\r\n\r\n",
    ],
    ids=lambda data: repr(data[:40]),
)
def test_broken_http(server: Server, data: bytes) -> None:
    answer = server.raw(data)
    head, _, content = answer.partition(b"\r\n\r\n")
    assert head.split(b" ")[1] in (b"400", b"413"), head
    body = json.loads(content)
    assert body["object"] == body["error"]["object"] == "error"


@pytest.mark.parametrize(
    "text",
    [r"\ud800", r"x\udc00", r"\udc00\ud800", r"\ud800\u0041", r"\ud800 and more", r"\ud83d\ude00\uDBFF"],
)
def test_half_a_character_is_called_that(server: Server, text: str) -> None:
    for content in (GOOD.replace(b'"x"', b'"%b"' % text.encode()), b'{"model":"%b"}' % text.encode()):
        body = send(server, content).json()
        assert (body["code"], body["error"]["code"]) == (400, "invalid_json")
        assert body["message"].endswith("it holds half of a surrogate pair")
    whole = GOOD.replace(b'"x"', rb'"\ud83d\ude00"')
    assert send(server, whole).status_code == 200
    assert send(server, whole[:-4]).json()["message"].endswith("truncated")


def test_a_request_id_that_could_harm_is_replaced(server: Server) -> None:
    for bad in ("", "x" * 257, "é".encode(), "a\tb", "a\x7fb", "a\x1b[2Jb", "日本".encode(), b"\xff"):
        answer = server.get("/health", headers={"x-request-id": bad})
        assert re.fullmatch("req-[0-9a-f]{32}", answer.headers["x-request-id"]), bad


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    one = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    last = b"GET /nope HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answer = server.raw(one * 3 + last)
    assert [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]] == [b"200"] * 3 + [b"404"]


def test_a_connection_stays_usable_after_an_error(server: Server) -> None:
    with httpx.Client(base_url=server.url, trust_env=False) as client:
        for _ in range(3):
            assert client.post(CHAT, content=b"{", headers=JSON).status_code == 400
            assert client.post(CHAT, content=GOOD, headers={"content-type": "text/plain"}).status_code == 415
            assert client.post(CHAT, content=GOOD, headers=JSON).status_code == 200


def test_many_idle_and_half_open_connections_do_not_block_others(server: Server) -> None:
    connections = [
        socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE_S) for _ in range(200)
    ]
    try:
        for connection in connections[::2]:
            connection.sendall(f"POST {CHAT} HTTP/1.1\r\nContent-Le".encode())
        assert server.chat().status_code == 200
    finally:
        for connection in connections:
            connection.close()


def test_text_that_looks_like_frames_stays_text(server: Server) -> None:
    text = "\n\ndata: [DONE]\n\nevent: x\r\n"
    server.set_reply(text)
    events = list(events_of(server.chat(stream=True, max_tokens=100)))
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == text


def test_a_model_name_with_quotes_is_echoed_whole(server: Server) -> None:
    name = 'a"\\\nb'
    context = server.context
    context.names._accepted.add(name)
    try:
        events = list(events_of(server.chat(model=name, stream=True)))
        assert {event["model"] for event in events} == {name}
    finally:
        context.names._accepted.discard(name)


@pytest.mark.parametrize(
    ("path", "field", "item"),
    [
        (CHAT, "messages", b'{"role":"user","content":""}'),
        ("/v1/completions", "prompt", b"7"),
        ("/v1/completions", "prompt", b'"a b c d e f g"'),
        (CHAT, "metadata", b"[[[[]]]]"),
    ],
)
def test_a_body_full_of_small_things_does_not_hold_up_others(
    server: Server, path: str, field: str, item: bytes
) -> None:
    content = GOOD[:-1] + b', "%s": [' % field.encode() + b",".join([item] * (3_000_000 // len(item))) + b"]}"

    async def longest_turn_s(done: threading.Event) -> float:
        """CPU time of this process between two turns of the server's loop, which is what others wait
        for, be it the loop or the interpreter's lock, and whatever else the machine does.
        """
        longest, last = 0.0, time.process_time()
        while not done.is_set():
            await asyncio.sleep(0.001)
            longest, last = max(longest, time.process_time() - last), time.process_time()
        return longest

    done = threading.Event()
    longest = asyncio.run_coroutine_threadsafe(longest_turn_s(done), server.loop)
    try:
        assert server.http.post(path, content=content, headers=JSON).status_code in (200, 400)
        assert server.get("/health").status_code == 200
    finally:
        done.set()
    assert longest.result(DEADLINE_S) < 0.5


def test_many_choices_share_their_stop_strings(server: Server) -> None:
    server.set_reply("x" * 5)
    stops = [f"{i:02}" + "abcdefgh" * 31 for i in range(32)]
    before = psutil.Process().memory_info().rss
    response = server.complete(prompt=["a"] * 1024, n=2, max_tokens=2, stop=stops)
    assert response.status_code == 200
    assert psutil.Process().memory_info().rss - before < 200 * 2**20


def test_a_client_that_vanishes_while_sending(server: Server) -> None:
    for size in (10, 200, 100_000):
        with socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE_S) as connection:
            connection.sendall(
                f"POST {CHAT} HTTP/1.1\r\nContent-Length: {size}\r\n\r\n".encode() + b"{" * (size // 2)
            )
    wait_until(lambda: server.call(lambda: len(server.connections)) <= 1)
    assert not server.engine.submitted


def test_a_conversation_of_too_many_messages(server: Server) -> None:
    response = server.chat(messages=[{"role": "user", "content": ""}] * 16385)
    assert (response.status_code, response.json()["param"]) == (400, "messages")


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
@pytest.mark.parametrize("field", ["guided_json", "structural_tag"])
def test_what_can_be_read_but_not_written_again_is_nested_too_deeply(
    server: Server, path: str, field: str
) -> None:
    """Around the depth at which the reader gives up; where that is depends on who calls it."""
    found = set()
    for depth in range(920, 1000):
        value = b'{"a":' + b"[" * depth + b"]" * depth + b"}"
        response = server.http.post(
            path, content=GOOD[:-1] + b',"%b":%b}' % (field.encode(), value), headers=JSON
        )
        found.add((response.status_code, response.json().get("error", {}).get("code")))
    assert (400, "invalid_json") in found and {status for status, _ in found} <= {200, 400}
