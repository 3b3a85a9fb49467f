"""POST /abort_request, and the field `rid`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from engine.core.messages import GenerateRequest
from helpers.engines import FakeStream
from helpers.http_server import DEADLINE_S, Server, events_of, wait_until


class Started:
    """A request sent from a thread; `response` waits for its answer."""

    def __init__(self, server: Server, send: Callable[[], httpx.Response]) -> None:
        self._answers: list[httpx.Response] = []
        known = len(server.engine.submitted)
        self._thread = threading.Thread(target=lambda: self._answers.append(send()))
        self._thread.start()
        wait_until(lambda: len(server.engine.submitted) > known)

    @property
    def response(self) -> httpx.Response:
        self._thread.join(DEADLINE_S)
        return self._answers[0]


def running(server: Server) -> int:
    return server.call(lambda: len(server.engine.running))


@pytest.fixture
def held(server: Server) -> Any:
    server.call(server.engine.hold)
    yield server
    server.call(server.engine.release)
    server.call(server.engine.release_admission)


def abort(server: Server, **body: Any) -> int:
    response = server.post("/abort_request", body)
    assert response.status_code == 200, response.text
    return response.json()["aborted"]


def test_a_whole_answer_ends_with_what_there_is(held: Server) -> None:
    for ask in (held.chat, held.complete):
        started = Started(held, lambda ask=ask: ask(rid="mine", n=2))
        wait_until(lambda: running(held) == 1)
        assert abort(held, rid="other") == 0
        assert abort(held, rid="mine") == 1
        body = started.response.json()
        assert [choice["finish_reason"] for choice in body["choices"]] == ["abort", "abort"]
        assert running(held) == 0
        assert abort(held, rid="mine") == 0


def test_a_stream_ends_in_good_order(held: Server) -> None:
    def ask() -> httpx.Response:
        return held.chat(rid="mine", stream=True, stream_options={"include_usage": True})

    started = Started(held, ask)
    wait_until(lambda: running(held) == 1)
    assert abort(held, rid="mine") == 1
    *_, last, usage = events_of(started.response)
    assert last["choices"][0]["finish_reason"] == "abort"
    assert usage["usage"]["completion_tokens"] == 0


def test_every_prompt_of_a_batch_ends(held: Server) -> None:
    started = Started(held, lambda: held.complete(rid="mine", prompt=["a", "b", "c"]))
    wait_until(lambda: running(held) == 3)
    assert abort(held, rid="mine") == 1
    choices = started.response.json()["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["abort"] * 3


def test_a_request_that_waits_can_be_aborted(held: Server) -> None:
    held.call(held.engine.hold_admission)
    for stream in (False, True):
        started = Started(held, lambda stream=stream: held.chat(rid="mine", stream=stream))
        assert abort(held, rid="mine") == 1
        response = started.response
        assert (response.status_code, response.json()["error"]["code"]) == (400, "request_aborted")


def test_prompts_that_are_not_submitted_yet(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks that submit them wait for their turn of the loop, and the engine knows nothing to cancel."""
    engine = server.engine
    submit, cancel = engine.submit, engine.cancel

    async def submit_after_abort(request: GenerateRequest) -> FakeStream:
        if not engine.submitted:
            assert server.context.live.abort("mine") == 1
        return await submit(request)

    def cancel_if_known(request_id: str) -> None:
        if any(request.request_id == request_id for request in engine.submitted):
            cancel(request_id)

    monkeypatch.setattr(engine, "submit", submit_after_abort)
    monkeypatch.setattr(engine, "cancel", cancel_if_known)
    answer = server.complete(prompt=["a", "b"], rid="mine")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "request_aborted")
    assert len(engine.submitted) == 2 and running(server) == 0


def test_the_id_of_the_answer_is_a_name_too(held: Server) -> None:
    started = Started(held, held.chat)
    wait_until(lambda: running(held) == 1)
    response_id = held.engine.submitted[-1].request_id.removesuffix("-0")
    assert abort(held, rid=response_id) == 1
    assert started.response.json()["id"] == response_id


def test_all_at_once(held: Server) -> None:
    started = [Started(held, lambda i=i: held.chat(rid=f"r{i}")) for i in range(3)]
    wait_until(lambda: running(held) == 3)
    assert abort(held, abort_all=True) == 3
    for one in started:
        assert one.response.json()["choices"][0]["finish_reason"] == "abort"
    assert abort(held, abort_all=True) == 0


def test_names_are_unique_among_live_requests_only(held: Server) -> None:
    started = Started(held, lambda: held.chat(rid="mine"))
    wait_until(lambda: running(held) == 1)
    for ask in (held.chat, held.complete):
        response = ask(rid="mine")
        assert (response.status_code, response.json()["param"]) == (400, "rid")
    assert running(held) == 1
    held.call(held.engine.release)
    assert started.response.json()["choices"][0]["finish_reason"] == "stop"
    assert held.chat(rid="mine").status_code == 200
    held.engine.refuse_with = ValueError("a bug")
    assert held.chat(rid="mine").status_code == 500
    held.engine.refuse_with = None
    assert held.chat(rid="mine").status_code == 200


@pytest.mark.parametrize("rid", ["", 5, ["a"], {}, "x" * 257, True])
def test_unusable_names(server: Server, rid: Any) -> None:
    for ask in (server.chat, server.complete):
        response = ask(rid=rid)
        assert (response.status_code, response.json()["param"]) == (400, "rid")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "rid"),
        ({"rid": None}, "rid"),
        ({"rid": ""}, "rid"),
        ({"rid": 5}, "rid"),
        ({"rid": "a", "abort_all": 1}, "abort_all"),
        ({"abort_all": False}, "rid"),
    ],
)
def test_unusable_aborts(server: Server, body: dict[str, Any], param: str) -> None:
    response = server.post("/abort_request", body)
    assert (response.status_code, response.json()["param"]) == (400, param)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_still_being_scored(held: Server, stream: bool) -> None:
    fields = {"prompt": "abc", "n": 2, "echo": True, "logprobs": 1, "stream": stream}
    started = Started(held, lambda: held.complete(rid="mine", **fields))
    wait_until(lambda: running(held) == 1)
    assert abort(held, rid="mine") == 1
    if not stream:
        for choice in started.response.json()["choices"]:
            assert (choice["text"], choice["finish_reason"]) == ("abc", "abort")
            assert choice["logprobs"]["token_logprobs"] == []
        return
    for index in range(2):
        parts = [event["choices"][0] for event in events_of(started.response)]
        own = [(part["text"], part["finish_reason"]) for part in parts if part["index"] == index]
        assert own == [("abc", None), ("", "abort")]


def test_request_id_is_another_word_for_rid(held: Server) -> None:
    """As vLLM calls it; of both, rid counts and the other one is reported."""
    started = Started(held, lambda: held.chat(request_id="mine", n=1))
    wait_until(lambda: running(held) == 1)
    assert abort(held, rid="mine") == 1
    assert started.response.json()["choices"][0]["finish_reason"] == "abort"
    assert "x-ignored-params" not in started.response.headers
    started = Started(held, lambda: held.complete(rid="mine", request_id="other"))
    wait_until(lambda: running(held) == 1)
    assert abort(held, rid="other") == 0
    assert abort(held, rid="mine") == 1
    assert started.response.headers["x-ignored-params"] == "request_id"
    for wrong in ("", "x" * 257, 7):
        for fields in ({}, {"rid": "a good one"}):
            refusal = held.chat(request_id=wrong, **fields)
            assert refusal.status_code == 400 and refusal.json()["param"] == "request_id"
