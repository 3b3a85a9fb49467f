"""What operators see: one line of JSON a request, why requests ended, and what the engine is busy with."""

from __future__ import annotations

import json
import logging
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.errors import Overloaded
from helpers.crowd import metrics
from helpers.http_server import DEADLINE_S, Server, sent_post, wait_until
from helpers.server_process import ServerProcess

HI = [{"role": "user", "content": "Hi"}]
Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def lines() -> Iterator[Lines]:
    """All lines so far."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("engine.requests")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield lambda: [json.loads(record) for record in records]
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_an_answer_has_one_line(server: Server, lines: Lines) -> None:
    for stream in (False, True):
        answer = server.chat(stream=stream, user="me", n=2)
        wait_until(lambda: answer.headers["x-request-id"] in str(lines()))  # noqa: B023
        line = lines()[-1]
        assert line["request_id"] == answer.headers["x-request-id"]
        assert line["id"].startswith("chatcmpl-")
        assert (line["endpoint"], line["status"], line["stream"]) == ("/v1/chat/completions", 200, stream)
        assert (line["choices"], line["prompt_tokens"], line["completion_tokens"]) == (2, 7, 26)
        assert (line["end"], line["user"]) == ("stop", "me")
        assert 0 <= line["queue_ms"] <= line["ttft_ms"] <= line["total_ms"]
        assert "key" not in line and "code" not in line
    server.get("/health")
    assert len(lines()) == 2, "what costs nothing is not logged"


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v1/chat/completions", b"{", 400, "invalid_json"),
        ("/v1/completions", b'{"model": "none", "prompt": "x"}', 404, "model_not_found"),
        ("/nowhere", b"", 404, "route_not_found"),
    ],
)
def test_a_refusal_has_one_line_too(
    server: Server, lines: Lines, path: str, body: bytes, status: int, code: str
) -> None:
    server.http.post(path, content=body, headers={"x-request-id": "mine"})
    wait_until(lambda: bool(lines()))
    (line,) = lines()
    endpoint = path if path.startswith("/v1") else "other"
    assert (line["request_id"], line["endpoint"]) == ("mine", endpoint)
    assert (line["status"], line["code"]) == (status, code)


@pytest.mark.parametrize(
    "given",
    [
        *("x" * 256, "a/b+c==", "me@example.com", "Root=1-67891233-abcdef012345678912345678", "a b"),
        *string.punctuation,
    ],
)
def test_an_id_of_printable_ascii_is_given_back_and_logged(server: Server, lines: Lines, given: str) -> None:
    for path in ("/v1/completions", "/nowhere"):
        body = {"model": "default", "prompt": "x"}
        answer = server.http.post(path, json=body, headers={"x-request-id": given})
        assert answer.headers["x-request-id"] == given
    wait_until(lambda: len(lines()) == 2)
    assert [line["request_id"] for line in lines()] == [given] * 2


def test_an_overloaded_engine_and_a_failure_in_a_stream(server: Server, lines: Lines) -> None:
    server.call(lambda: setattr(server.engine, "refuse_with", Overloaded("full")))
    server.chat()
    server.call(lambda: setattr(server.engine, "refuse_with", None))
    server.call(lambda: setattr(server.engine, "fail_with", Overloaded("gone", slug="engine_restarted")))
    server.chat(stream=True)
    server.chat()
    wait_until(lambda: len(lines()) == 3)
    refused, in_stream, whole = lines()
    assert (refused["status"], refused["code"]) == (503, "queue_full")
    assert (in_stream["status"], in_stream["code"], in_stream["end"]) == (
        200,
        "engine_restarted",
        "engine_restarted",
    )
    assert (whole["status"], whole["code"], whole["end"]) == (503, "engine_restarted", "error")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": HI}),
        ("/v1/completions", {"prompt": "x", "stream": True}),
        ("/v1/embeddings", {"input": "x"}),
    ],
)
@pytest.mark.parametrize("waits", [True, False])
def test_a_client_that_leaves(
    model_dir: Path, lines: Lines, path: str, body: dict[str, Any], waits: bool
) -> None:
    """Has one line that says so, and counts as cancelled: nobody refused it."""
    with Server(model_dir) as server:
        server.call(server.engine.hold_admission if waits else server.engine.hold)
        with sent_post(server.url, path, {"model": "default", **body}):
            wait_until(lambda: bool(server.engine.submitted or server.engine.embedded))
        wait_until(lambda: lines() != [])
        server.call(server.engine.release_admission)
        server.call(server.engine.release)
        server.wait_idle()
        samples = metrics(server.http)
    assert samples['engine:cancelled_total{cause="client"}'] == 1
    assert not any(name.startswith("engine:rejected_total{") for name in samples)
    (line,) = lines()
    assert (line["endpoint"], line["status"]) == (path, 499)


def test_the_state_can_be_seen(bundled: ServerProcess) -> None:
    body = {"model": "default", "prompt": "x" * 40, "max_tokens": 1500, "ignore_eos": True, "stream": True}
    body["n"] = 32
    headers = {"x-request-id": "my trace 1"}
    with bundled.http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        assert response.status_code == 200, response.read()
        events = response.iter_lines()  # kept: its end closes the connection
        next(events)
        state = httpx.get(f"{bundled.url}/debug/state", timeout=DEADLINE_S, trust_env=False).json()
        assert state["server"]["state"] == "ready"
        (live,) = state["server"]["live_requests"]
        running = state["engine"]["running"][0]
        assert running["id"].startswith(live)
        assert running["x_request_id"] == "my trace 1"
        assert running["prompt_tokens"] <= running["computed_tokens"] < running["most_tokens"]
        blocks = state["engine"]["blocks"]
        assert blocks["free"] + blocks["cached"] + blocks["in_use"] == blocks["total"]
        assert state["engine"]["tree"]["nodes"] >= 1
    for line in bundled.log.rpartition("\n")[0].splitlines():  # whole ones
        if line.startswith("{"):
            json.loads(line)


def test_steps_and_restarts_are_counted(bundled: ServerProcess) -> None:
    bundled.http.post("/v1/completions", json={"model": "default", "prompt": "x", "max_tokens": 3})
    values = dict(
        line.rsplit(" ", 1) for line in bundled.http.get("/metrics").text.splitlines() if line[0] != "#"
    )
    assert float(values["engine:engine_restarts_total"]) == 0
    assert float(values["engine:steps_total"]) >= 3
    for part in ("schedule", "model", "update"):
        assert float(values[f'engine:step_seconds_total{{part="{part}"}}']) > 0
