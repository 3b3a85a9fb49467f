"""Every refusal has its status and the one body that both kinds of client can read."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from engine.core.client import EngineState
from engine.errors import InternalError, InvalidRequest, NativeError, Overloaded
from helpers.http_server import Server, events_of


def check(response: httpx.Response, status: int, slug: str, param: str | None = None) -> dict[str, Any]:
    """The body of an error, after checking that it is whole."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    nested = body["error"]
    assert set(body) == {"object", "message", "type", "param", "code", "error"}
    assert set(nested) == {"object", "message", "type", "param", "code"}
    assert body["object"] == nested["object"] == "error"
    assert body["message"] == nested["message"] != ""
    assert body["type"] == nested["type"]
    assert body["param"] == nested["param"] == param
    assert (body["code"], nested["code"]) == (status, slug)
    assert (
        "Traceback" not in body["message"] and "/work" not in body["message"] and "\n" not in body["message"]
    )
    return body


def test_the_sentence_of_the_specification(server: Server) -> None:
    body = check(server.chat(temperature=-1), 400, "invalid_value", "temperature")
    assert body["message"] == "Invalid request: temperature must be non-negative"
    assert body["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("temperature", 2.01),
        ("temperature", "0.7"),
        ("temperature", True),
        ("temperature", 10**400),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 1.5),
        ("frequency_penalty", 2.5),
        ("presence_penalty", -2.5),
        ("repetition_penalty", 0),
        ("max_tokens", -1),
        ("max_tokens", "5"),
        ("max_tokens", 1.5),
        ("max_tokens", [5]),
        ("max_tokens", 2**63),
        ("max_completion_tokens", -1.5),
        ("max_completion_tokens", -1),
        ("min_tokens", 1000),
        ("n", 0),
        ("n", 129),
        ("n", "1"),
        ("seed", 2**64),
        ("seed", "x"),
        ("stop", 5),
        ("stop", ["a", 5]),
        ("stop", [""]),
        ("stop", ["x"] * 33),
        ("stop", {"a": 1}),
        ("stream", "true"),
        ("stream", 1),
        ("stream_options", []),
        ("logit_bias", [1]),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"1_0": 1}),
        ("logit_bias", {"٣": 1}),
        ("logit_bias", {"999": 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"1": None}),
        ("stop_token_ids", [257]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", 5),
        ("stop_token_ids", [1] * 1025),
        ("ignore_eos", "yes"),
        ("cache_salt", 5),
        ("cache_salt", "x" * 300),
        ("chat_template_kwargs", [1]),
        ("chat_template_kwargs", {"messages": []}),
        ("chat_template_kwargs", {"continue_final_message": 1}),
    ],
)
def test_bad_values_name_their_field(server: Server, param: str, value: Any) -> None:
    body = check(server.chat(**{param: value}), 400, "invalid_value", param)
    assert body["message"].startswith(f"Invalid request: {param} ")
    assert f"{param} {param}" not in body["message"]
    assert not server.engine.submitted


@pytest.mark.parametrize("param", ["max_tokens", "temperature", "n", "logprobs", "stop", "seed"])
def test_completions_check_the_same(server: Server, param: str) -> None:
    check(server.complete(**{param: {"a": 1}}), 400, "invalid_value", param)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {}, "model"),
        ("/v1/chat/completions", {"model": None}, "model"),
        ("/v1/chat/completions", {"model": "default"}, "messages"),
        ("/v1/chat/completions", {"model": "default", "messages": None}, "messages"),
        ("/v1/chat/completions", {"model": "default", "messages": [{"content": "x"}]}, "messages[0].role"),
        ("/v1/chat/completions", {"model": "default", "messages": [{"role": "user"}]}, "messages[0].content"),
        ("/v1/completions", {"prompt": "x"}, "model"),
        ("/v1/completions", {"model": "default"}, "prompt"),
    ],
)
def test_missing_fields(server: Server, path: str, body: Any, param: str) -> None:
    body = check(server.post(path, body), 400, "missing_required_parameter", param)
    assert body["message"] == f"Invalid request: {param} is required"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hello", "messages"),
        ({"role": "user"}, "messages"),
        (["hello"], "messages"),
        ([{"role": "root", "content": "x"}], "messages[0].role"),
        ([{"role": 5, "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": "x", "name": 5}], "messages[0].name"),
    ],
)
def test_bad_messages(server: Server, messages: Any, param: str) -> None:
    check(server.chat(messages=messages), 400, "invalid_value", param)


@pytest.mark.parametrize(
    "prompt", ["", [], [[]], ["a", ""], [1, "a"], ["a", 1], [[1], [257]], [-1], [1.5], 5, {}, [True]]
)
def test_bad_prompts(server: Server, prompt: Any) -> None:
    check(server.complete(prompt=prompt), 400, "invalid_value", "prompt")


def test_too_many_prompts(server: Server) -> None:
    check(server.complete(prompt=["a"] * 1025), 400, "invalid_value", "prompt")
    check(server.complete(prompt=["a"] * 1024, n=3), 400, "invalid_value", "n")


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("regex", r"\d+"),
        ("ebnf", "root ::= 'a'"),
        ("lora_path", "/path/to/adapter"),
        ("guided_json", {}),
        ("structured_outputs", {"regex": "a"}),
        ("modalities", ["text", "audio"]),
        ("reasoning_effort", "low"),
        ("prompt_logprobs", 1),
        ("stop_regex", "a"),
        ("bad_words", ["a"]),
        ("use_beam_search", True),
    ],
)
def test_what_is_not_served_is_refused(server: Server, param: str, value: Any) -> None:
    check(server.chat(**{param: value}), 400, "unsupported_parameter", param)


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
        ({"json_schema": "{}"}, "json_schema"),
    ],
)
def test_what_completions_do_not_serve(server: Server, fields: dict[str, Any], param: str) -> None:
    check(server.complete(**fields), 400, "unsupported_parameter", param)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "messages[0].tool_calls"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            "messages[0].content[0].type",
        ),
    ],
)
def test_messages_that_are_not_served(server: Server, message: Any, param: str) -> None:
    check(server.chat(messages=[message]), 400, "unsupported_parameter", param)


def test_top_logprobs_need_logprobs(server: Server) -> None:
    check(server.chat(top_logprobs=2), 400, "invalid_value", "top_logprobs")
    check(server.chat(logprobs=True, top_logprobs=21), 400, "invalid_value", "top_logprobs")
    check(server.complete(logprobs=21), 400, "invalid_value", "logprobs")


def test_completions_need_room_for_a_token(server: Server) -> None:
    check(server.complete(max_tokens=0), 400, "invalid_value", "max_tokens")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_unknown_models(server: Server, path: str) -> None:
    body = check(server.post(path, {"model": "gpt-9"}), 404, "model_not_found", "model")
    assert body["type"] == "invalid_request_error"
    assert "gpt-9" in body["message"]
    with pytest.raises(openai.NotFoundError):
        server.sdk().models.retrieve("gpt-9")


def test_prompts_longer_than_the_context(server: Server) -> None:
    body = check(server.complete(prompt="x" * 2048), 400, "context_length_exceeded")
    assert body["message"] == (
        "Invalid request: The input (2048 tokens) is longer than the model's context length (2048 tokens)."
    )
    for prompt in ("x" * 2_000_000, " " * 15_000_000):
        body = check(server.complete(prompt=prompt), 400, "context_length_exceeded")
        assert f"{len(prompt)} characters" in body["message"]
    long_chat = server.chat(messages=[{"role": "user", "content": "x" * 5000}])
    check(long_chat, 400, "context_length_exceeded")


def test_prompt_and_answer_longer_than_the_context(server: Server) -> None:
    assert server.complete(prompt="x" * 2000, max_tokens=48).status_code == 200
    body = check(
        server.complete(prompt="x" * 2000, max_tokens=49), 400, "context_length_exceeded", "max_tokens"
    )
    assert "2048" in body["message"] and "2049" in body["message"]


def test_routes_and_methods(server: Server) -> None:
    assert check(server.get("/nope"), 404, "route_not_found")["type"] == "not_found_error"
    check(server.post("/v2/chat/completions", {}), 404, "route_not_found")
    check(server.get("/v1/chat/completions"), 405, "method_not_allowed")
    check(server.http.delete("/v1/models"), 405, "method_not_allowed")


@pytest.mark.parametrize("stream", [False, True])
def test_refusals_by_the_engine_are_status_codes_for_streams_too(server: Server, stream: bool) -> None:
    server.engine.refuse_with = Overloaded("The request queue is full.", slug="queue_full", retry_after_s=2.5)
    response = server.chat(stream=stream)
    body = check(response, 503, "queue_full")
    assert body["type"] == "overloaded_error"
    assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == ("3", "2500")
    with pytest.raises(openai.InternalServerError):
        server.sdk().chat.completions.create(
            model="default", messages=[{"role": "user", "content": "x"}], stream=stream
        )
    server.engine.refuse_with = InvalidRequest("the grammar is wrong", param="regex")
    body = check(server.chat(stream=stream), 400, "invalid_value", "regex")
    assert body["message"] == "Invalid request: the grammar is wrong"


def test_one_refused_prompt_of_several_cancels_the_others(server: Server) -> None:
    submit = server.engine.submit

    async def refuse_b(request: Any) -> Any:
        if server.prompt_text(request) == "b":
            raise Overloaded("full")
        return await submit(request)

    server.engine.submit = refuse_b
    try:
        check(server.complete(prompt=["a", "b", "c"]), 503, "queue_full")
    finally:
        del server.engine.submit
    server.wait_idle()


@pytest.mark.parametrize(
    "error", [InternalError("secret detail"), NativeError("secret detail"), ValueError("secret detail")]
)
def test_failures_tell_the_client_nothing_but_the_request_id(server: Server, error: Exception) -> None:
    server.engine.fail_with = error
    response = server.chat()
    body = check(response, 500, "internal_error")
    assert body["type"] == "internal_server_error"
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
            body = check(response, 503, slug)
            assert body["message"] == "because of this"
            assert int(response.headers["retry-after"]) >= 1
            assert response.headers.get("x-should-retry") == ("false" if slug == "shutting_down" else None)
        check(server.get("/nope"), 404, "route_not_found")
    finally:
        server.call(lambda: server.engine.set_state(EngineState.READY))
    assert server.get("/health").status_code == 200


def test_the_sdk_reads_the_error(server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.sdk().chat.completions.create(
            model="default", messages=[{"role": "user", "content": "x"}], temperature=-1
        )
    error = caught.value
    assert (error.status_code, error.code, error.type, error.param) == (
        400,
        "invalid_value",
        "invalid_request_error",
        "temperature",
    )
    assert error.body["message"] == "Invalid request: temperature must be non-negative"
    assert error.body["object"] == "error"
