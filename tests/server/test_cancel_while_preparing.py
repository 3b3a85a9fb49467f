"""Requests that do not run yet: whose adapter is read, or whose constraint is compiled."""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from engine.config.server_config import ServerConfig
from helpers.constrained_chat import endless_regex
from helpers.http_server import DEADLINE_S, Server, sent_post, wait_until, write_adapter
from helpers.server_process import ServerProcess, write_llama

BODIES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"prompt": ["Hi", "Ho"], "n": 2, "stream": True},
    "/v1/embeddings": {"input": "Hi"},
    "/v1/rerank": {"query": "Hi", "documents": ["a", "b"]},
}


def in_thread(send: Callable[[], httpx.Response]) -> Callable[[], httpx.Response]:
    """What waits for the answer."""
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(send()))
    thread.start()

    def answer() -> httpx.Response:
        thread.join(DEADLINE_S)
        return answers[0]

    return answer


@pytest.fixture
def lora(model_dir: Path, tmp_path: Path) -> Iterator[Server]:
    """A server whose engine reads no adapter before `release`."""
    write_adapter(tmp_path / "one", b"one")
    with Server(model_dir, config=ServerConfig(lora_dir=(str(tmp_path),), queue_timeout=300)) as server:
        server.call(server.engine.hold)
        yield server
        server.call(server.engine.release)
        server.wait_idle()


def assert_nothing_left(server: Server) -> None:
    """And the adapter that was being read serves whoever comes next."""
    wait_until(lambda: server.context.live.names() == [])
    assert not server.engine.submitted and not server.engine.embedded
    server.call(server.engine.release)
    answer = server.post("/v1/completions", {"model": "default", "prompt": "Hi", "lora_path": "one"})
    assert answer.status_code == 200, answer.text
    (adapter,) = server.context.adapters
    assert adapter.num_live == 0
    assert len(server.engine.adapter_loads) == 1


@pytest.mark.parametrize("path", BODIES)
def test_an_abort_while_the_adapter_is_read(lora: Server, path: str) -> None:
    body = {"model": "default", "lora_path": "one", "rid": "mine", **BODIES[path]}
    answer = in_thread(lambda: lora.post(path, body))
    wait_until(lambda: bool(lora.engine.adapter_loads))
    assert lora.post("/abort_request", {"rid": "mine"}).json()["aborted"] == 1
    assert (answer().status_code, answer().json()["error"]["code"]) == (400, "request_aborted")
    assert_nothing_left(lora)


@pytest.mark.parametrize("path", BODIES)
def test_a_client_that_leaves_while_the_adapter_is_read(lora: Server, path: str) -> None:
    body = {"model": "default", "lora_path": "one", **BODIES[path]}
    with sent_post(lora.url, path, body):
        wait_until(lambda: bool(lora.engine.adapter_loads))
    assert_nothing_left(lora)


def test_reading_an_adapter_counts_as_waiting(model_dir: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "one", b"one")
    with Server(model_dir, config=ServerConfig(lora_dir=(str(tmp_path),), queue_timeout=0.2)) as server:
        server.call(server.engine.hold)
        for path in BODIES:
            answer = server.post(path, {"model": "default", "lora_path": "one", **BODIES[path]})
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "queue_timeout")
        assert_nothing_left(server)


def compiling(server: ServerProcess) -> list[psutil.Process]:
    """Processes that try constraints out: children of the grammar helper."""
    trials = []
    for helper in server.engine.children():
        with contextlib.suppress(psutil.NoSuchProcess):  # no helper, and over
            trials += helper.children()
    return trials


def state_of(server: ServerProcess) -> dict[str, Any]:
    return server.http.get("/debug/state").json()["engine"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("leaves", [False, True], ids=["abort", "leave"])
def test_a_request_that_ends_while_its_constraint_compiles(
    bundled: ServerProcess, stream: bool, leaves: bool
) -> None:
    rid = uuid.uuid4().hex
    body: dict[str, Any] = {
        "model": "default",
        "messages": [{"role": "user", "content": "Hi"}],
        "regex": endless_regex(rid),
        "rid": rid,
        "stream": stream,
        "n": 2,
    }
    with sent_post(bundled.url, "/v1/chat/completions", body, x_request_id=f"trace of {rid}") as connection:
        wait_until(lambda: compiling(bundled) != [] != state_of(bundled)["compiling"])
        (seen,) = state_of(bundled)["compiling"]
        assert (seen["x_request_id"], seen["choices"]) == (f"trace of {rid}", 2)
        if not leaves:
            assert bundled.http.post("/abort_request", json={"rid": rid}).json()["aborted"] == 1
            answer = connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 400 ") and b'"request_aborted"' in answer
    wait_until(lambda: compiling(bundled) == [])
    wait_until(lambda: not bundled.http.get("/v1/loads").json()["aggregate"]["num_total_reqs"])
    assert bundled.http.get("/debug/state").json()["server"]["live_requests"] == []
    state = state_of(bundled)
    assert not any(state[where] for where in ("running", "waiting", "compiling"))
    assert state["blocks"]["in_use"] == 0
    quick = {**body, "rid": None, "stream": False, "regex": "ok"}
    assert (
        bundled.http.post("/v1/chat/completions", json=quick).json()["choices"][1]["message"]["content"]
        == "ok"
    )


def test_tokens_wait_while_a_constraint_compiles(tmp_path: Path) -> None:
    """They count for --max-queued-tokens, and keep no other client from its place."""
    model = str(write_llama(tmp_path, max_position_embeddings=60_000))  # some answers last
    flags = ("--max-running-requests", "1", "--max-queued-tokens", "60", "--grammar-timeout", "60")
    keys = ("--api-key", "ours", "--api-key", "theirs")
    with ServerProcess("--model-path", model, "--load-format", "dummy", *flags, *keys) as server:
        server.http.headers["authorization"] = "Bearer ours"
        server.wait_ready()

        def post(num_tokens: int, rid: str, key: str = "ours", **fields: Any) -> httpx.Response:
            body = {"model": "default", "prompt": [5] * num_tokens, "ignore_eos": True, "rid": rid, **fields}
            headers = {"authorization": f"Bearer {key}"}
            return server.http.post("/v1/completions", json={"max_tokens": 5, **body}, headers=headers)

        def names(where: str) -> set[str]:
            return {each["x_request_id"] for each in state_of(server)[where]}

        def is_refused(answer: httpx.Response) -> bool:
            return answer.status_code == 503 and "too many tokens" in answer.json()["error"]["message"]

        running = in_thread(lambda: post(3, "running", max_tokens=50_000))
        wait_until(lambda: len(names("running")) == 1)
        compiled = in_thread(lambda: post(40, "compiled", regex=endless_regex("a")))
        wait_until(lambda: len(names("compiling")) == 1)
        assert is_refused(post(21, "plain"))
        assert is_refused(post(21, "another", regex=endless_regex("b")))
        theirs = in_thread(lambda: post(40, "theirs", "theirs"))
        wait_until(lambda: len(names("waiting")) == 1)
        small = in_thread(lambda: post(10, "small", regex=endless_regex("c")))
        wait_until(lambda: len(names("compiling")) == 2)
        assert server.http.post("/abort_request", json={"abort_all": True}).status_code == 200
        answers = [answer() for answer in (compiled, small, theirs)]
        assert [answer.json()["error"]["code"] for answer in answers] == ["request_aborted"] * 3
        assert running().json()["choices"][0]["finish_reason"] == "abort"
        assert post(40, "again").status_code == 200
        assert server.stop() == 0
