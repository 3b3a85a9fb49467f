"""Refusals that need an engine in a certain state, and what they say; those of a table are in
test_refusals.py.
"""

from __future__ import annotations

from typing import Any

import openai
import pytest

from engine.core.client import EngineState
from engine.errors import InternalError, InvalidRequest, NativeError, Overloaded
from helpers.errors import check_error
from helpers.http_server import Server, events_of


def test_the_sentence_of_the_specification(server: Server) -> None:
    body = check_error(server.chat(temperature=-1), 400, "invalid_value", "temperature")
    assert body["message"] == "Invalid request: temperature must be non-negative"
    assert body["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("functions", [{"name": "f"}]),
        ("modalities", ["text", "audio"]),
        ("reasoning_effort", "low"),
        ("prompt_logprobs", 1),
        ("stop_regex", "a"),
        ("bad_words", ["a"]),
        ("use_beam_search", True),
    ],
)
def test_what_is_not_served_is_refused(server: Server, param: str, value: Any) -> None:
    check_error(server.chat(**{param: value}), 400, "unsupported_parameter", param)


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"regex": "", "ebnf": ""},
        {"modalities": ["text"]},
    ],
)
def test_values_that_ask_for_nothing_are_accepted(server: Server, fields: dict[str, Any]) -> None:
    response = server.chat(**fields)
    assert response.status_code == 200, response.text
    assert "x-ignored-params" not in response.headers


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
    ],
)
def test_what_completions_do_not_serve(server: Server, fields: dict[str, Any], param: str) -> None:
    check_error(server.complete(**fields), 400, "unsupported_parameter", param)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": "x", "tool_calls": [{"id": "1"}]}, "messages[0].tool_calls"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            "messages[0].content[0].type",
        ),
    ],
)
def test_messages_that_are_not_served(server: Server, message: Any, param: str) -> None:
    check_error(server.chat(messages=[message]), 400, "unsupported_parameter", param)


def test_prompts_longer_than_the_context(server: Server) -> None:
    body = check_error(server.complete(prompt="x" * 2048), 400, "context_length_exceeded")
    assert body["message"] == (
        "Invalid request: The input (2048 tokens) is longer than the model's context length (2048 tokens)."
    )
    for prompt in ("x" * 2_000_000, " " * 15_000_000):
        body = check_error(server.complete(prompt=prompt), 400, "context_length_exceeded")
        assert f"{len(prompt)} characters" in body["message"]
    long_chat = server.chat(messages=[{"role": "user", "content": "x" * 5000}])
    check_error(long_chat, 400, "context_length_exceeded")


def test_prompt_and_answer_longer_than_the_context(server: Server) -> None:
    assert server.complete(prompt="x" * 2000, max_tokens=48).status_code == 200
    body = check_error(
        server.complete(prompt="x" * 2000, max_tokens=49), 400, "context_length_exceeded", "max_tokens"
    )
    assert "2048" in body["message"] and "2049" in body["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_refusals_by_the_engine_are_status_codes_for_streams_too(server: Server, stream: bool) -> None:
    server.engine.refuse_with = Overloaded("The request queue is full.", slug="queue_full", retry_after_s=2.5)
    response = server.chat(stream=stream)
    body = check_error(response, 503, "queue_full")
    assert body["type"] == "overloaded_error"
    assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == ("3", "2500")
    with pytest.raises(openai.InternalServerError):
        server.sdk().chat.completions.create(
            model="default", messages=[{"role": "user", "content": "x"}], stream=stream
        )
    server.engine.refuse_with = InvalidRequest("the grammar is wrong", param="regex")
    body = check_error(server.chat(stream=stream), 400, "invalid_value", "regex")
    assert body["message"] == "Invalid request: the grammar is wrong"


def test_one_refused_prompt_of_several_cancels_the_others(server: Server) -> None:
    submit = server.engine.submit

    async def refuse_b(request: Any) -> Any:
        if server.prompt_text(request) == "b":
            raise Overloaded("full")
        return await submit(request)

    server.engine.submit = refuse_b
    try:
        check_error(server.complete(prompt=["a", "b", "c"]), 503, "queue_full")
    finally:
        del server.engine.submit
    server.wait_idle()


@pytest.mark.parametrize(
    "error", [InternalError("secret detail"), NativeError("secret detail"), ValueError("secret detail")]
)
def test_failures_tell_the_client_nothing_but_the_request_id(server: Server, error: Exception) -> None:
    server.engine.fail_with = error
    response = server.chat()
    body = check_error(response, 500, "internal_error")
    assert body["type"] == body["error"]["type"] == "internal_error"
    assert response.headers["x-request-id"] in body["message"]
    assert "secret" not in response.text


@pytest.mark.parametrize(
    "error", [InternalError("boom"), Overloaded("again", slug="engine_restarted"), KeyError("x")]
)
def test_an_error_in_a_stream_is_an_event_that_the_sdk_raises(server: Server, error: Exception) -> None:
    server.engine.fail_with = error
    response = server.chat(stream=True)
    assert response.status_code == 200
    *_, last = events_of(response)
    assert last["object"] == last["error"]["object"] == "error"
    assert last["code"] == (503 if isinstance(error, Overloaded) else 500)
    with pytest.raises(openai.APIError) as caught:
        for _ in server.sdk().chat.completions.create(
            model="default", messages=[{"role": "user", "content": "x"}], stream=True
        ):
            pass
    assert caught.value.message.split("request req-")[0] == last["message"].split("request req-")[0]


@pytest.mark.parametrize(
    ("state", "slug"),
    [
        (EngineState.LOADING, "model_loading"),
        (EngineState.DRAINING, "shutting_down"),
        (EngineState.RESTARTING, "engine_restarted"),
        (EngineState.FAILED, "engine_restarted"),
    ],
)
def test_an_engine_that_is_not_ready(server: Server, state: EngineState, slug: str) -> None:
    server.call(lambda: server.engine.set_state(state, "because of this"))
    try:
        for response in (
            server.chat(),
            server.chat(stream=True),
            server.complete(),
            server.get("/health"),
            server.get("/v1/models"),
            server.get("/get_model_info"),
        ):
            body = check_error(response, 503, slug)
            assert body["message"] == "because of this"
            assert int(response.headers["retry-after"]) >= 1
            assert response.headers.get("x-should-retry") == ("false" if slug == "shutting_down" else None)
        check_error(server.get("/nope"), 404, "route_not_found")
    finally:
        server.call(lambda: server.engine.set_state(EngineState.READY))
    assert server.get("/health").status_code == 200
