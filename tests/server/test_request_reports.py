"""What a request may ask to be told about itself: timings, truncation; and on whose behalf it comes."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from engine.server import schema
from engine.server.schema import Defaults, parse_chat
from helpers.http_server import Server, events_of, wait_until

HI: list[Any] = [{"role": "user", "content": "Hi"}]
TIMES = {"queue_ms", "prefill_ms", "decode_ms", "ttft_ms", "total_ms"}


# --- return_timings


def check_timings(timings: dict[str, float]) -> None:
    assert set(timings) == TIMES
    assert all(value >= 0 for value in timings.values())
    parts = timings["queue_ms"] + timings["prefill_ms"]
    assert timings["ttft_ms"] == pytest.approx(parts, abs=0.01)
    assert timings["total_ms"] == pytest.approx(parts + timings["decode_ms"], abs=0.01)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"max_tokens": 0, "echo": True}, {"prompt": ["a", "b"]}])
def test_timings_of_a_whole_answer(server: Server, path: str, fields: dict[str, Any]) -> None:
    if path == "/v1/chat/completions":
        fields = {name: value for name, value in fields.items() if name in ("n", "max_tokens")}
    body = {"model": "default", "messages": HI, "prompt": "Hi", "return_timings": True, **fields}
    response = server.post(path, body)
    timings = response.json()["timings"]
    check_timings(timings)
    header = dict(re.findall(r"(\w+);dur=([\d.]+)", response.headers["server-timing"]))
    assert list(header) == ["queue", "prefill", "decode"]
    assert all(float(header[name]) >= 0 for name in header)


def test_timings_tell_where_the_time_went(server: Server) -> None:
    """A request that is held up before its admission says so."""
    server.call(server.engine.hold_admission)
    release = server.engine.release_admission
    server.loop.call_soon_threadsafe(lambda: server.loop.call_later(0.3, release))
    timings = server.chat(return_timings=True).json()["timings"]
    assert timings["queue_ms"] > 250 > timings["prefill_ms"] + timings["decode_ms"]


@pytest.mark.parametrize("usage", [False, True])
def test_timings_of_a_stream_come_with_its_last_event(server: Server, usage: bool) -> None:
    response = server.chat(stream=True, return_timings=True, stream_options={"include_usage": usage})
    *others, last = events_of(response)
    check_timings(last["timings"])
    assert not any("timings" in event for event in others)
    assert re.fullmatch(r"queue;dur=[\d.]+", response.headers["server-timing"])


def test_nobody_gets_timings_without_asking(server: Server) -> None:
    for fields in ({}, {"return_timings": False}, {"return_timings": None}):
        response = server.chat(**fields)
        assert "timings" not in response.json() and "server-timing" not in response.headers
    assert server.chat(return_timings="yes").status_code == 400


# --- truncate_prompt_tokens


def prompts(server: Server) -> list[str]:
    return [server.prompt_text(request) for request in server.engine.submitted]


def test_a_prompt_is_cut_on_the_left(server: Server) -> None:
    response = server.complete(prompt=["abcdef", "xy"], truncate_prompt_tokens=4)
    assert prompts(server) == ["cdef", "xy"]
    assert response.json()["truncated_prompt_tokens"] == 2
    assert response.headers["x-truncated-prompt-tokens"] == "2"
    assert response.json()["usage"]["prompt_tokens"] == 6


def test_token_ids_are_cut_too_and_the_echo_is_what_is_left(server: Server) -> None:
    fields = {"echo": True, "logprobs": 0, "max_tokens": 0, "truncate_prompt_tokens": 3}
    for prompt in ("añ bc", server.ids("añ bc")):
        choice = server.complete(prompt=prompt, **fields).json()["choices"][0]
        assert choice["text"] == " bc"
        assert choice["logprobs"]["tokens"] == [" ", "b", "c"]
        assert choice["logprobs"]["text_offset"] == [0, 1, 2]


def test_nothing_is_cut_from_what_is_short(server: Server) -> None:
    response = server.chat(truncate_prompt_tokens=1000)
    assert response.json()["truncated_prompt_tokens"] == 0
    assert "x-truncated-prompt-tokens" not in response.headers
    assert "truncated_prompt_tokens" not in server.chat().json()


@pytest.mark.parametrize(("max_tokens", "kept"), [(48, 2000), (0, 2048), (2047, 1), (None, 2032)])
def test_minus_one_leaves_room_for_the_answer(server: Server, max_tokens: int | None, kept: int) -> None:
    response = server.complete(
        prompt="x" * 3000, truncate_prompt_tokens=-1, max_tokens=max_tokens, echo=max_tokens == 0
    )
    assert response.status_code == 200, response.text
    (request,) = server.engine.submitted
    assert len(request.prompt_ids) == kept
    assert response.json()["truncated_prompt_tokens"] == 3000 - kept


def test_a_conversation_keeps_its_end(server: Server) -> None:
    stream = server.chat(
        messages=[{"role": "user", "content": "x" * 5000 + "the end"}], truncate_prompt_tokens=12, stream=True
    )
    *_, last = events_of(stream)
    assert prompts(server) == ["the end;a:"[-12:].rjust(12, "x")]
    assert last["truncated_prompt_tokens"] == int(stream.headers["x-truncated-prompt-tokens"])
    counted = server.post("/tokenize", {"messages": HI, "truncate_prompt_tokens": 3}).json()
    assert (counted["count"], len(counted["tokens"])) == (3, 3)


def test_what_is_kept_must_fit(server: Server) -> None:
    response = server.complete(prompt="x" * 3000, truncate_prompt_tokens=2500)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")
    response = server.complete(prompt="x" * 3000, truncate_prompt_tokens=-1, max_tokens=2048)
    assert response.status_code == 400


@pytest.mark.parametrize("value", [0, -2, 2**31, 1.5, "3", True, [1]])
def test_other_values_are_refused(server: Server, value: Any) -> None:
    response = server.chat(truncate_prompt_tokens=value)
    assert (response.status_code, response.json()["param"]) == (400, "truncate_prompt_tokens")


# --- user


def test_user_is_for_the_log(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="engine"):
        response = server.sdk().chat.completions.with_raw_response.create(
            model="default", messages=HI, user="me\nforged line"
        )
        server.chat()
        wait_until(lambda: caplog.text.count('"end":"stop"') == 2)
    assert "x-ignored-params" not in response.headers
    first, second = (json.loads(message) for message in caplog.messages if '"end":"stop"' in message)
    assert first["user"] == "me\nforged line"
    assert "user" not in second


@pytest.mark.parametrize("user", [7, ["a"], {}, "x" * 257])
def test_no_other_user_is_taken(server: Server, user: Any) -> None:
    response = server.complete(user=user)
    assert (response.status_code, response.json()["param"]) == (400, "user")


# --- the default of max_tokens in chats


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({}, 16),
        ({"response_format": {"type": "text"}, "tools": [], "regex": "", "ebnf": ""}, 16),
        ({"response_format": {"type": "json_object"}}, None),
        ({"regex": "a+"}, None),
        ({"ebnf": 'root ::= "a"'}, None),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, None),
        ({"regex": "a+", "max_tokens": 5}, 5),
        ({"max_completion_tokens": 7, "max_tokens": 5}, 7),
    ],
)
def test_only_plain_answers_have_a_default_limit(
    fields: dict[str, Any], limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(schema._NEUTRAL, "tools", raising=False)  # as if they were served
    defaults = Defaults(max_tokens=16, constraint_lifts_limit=True, sampling={})
    asked = parse_chat({"model": "m", "messages": HI, **fields}, defaults)
    assert asked.params.max_tokens == limit


# --- what others serve and we do not


@pytest.mark.parametrize(
    ("name", "neutral", "other"),
    [
        ("typical_p", 1.0, 0.5),
        ("dry_multiplier", 0, 0.8),
        ("mirostat", 0, 2),
        ("early_stopping", False, True),
        ("vllm_xargs", {}, {"a": 1}),
        ("return_meta_info", False, True),
    ],
)
def test_what_would_change_the_answer_is_not_ignored(
    server: Server, name: str, neutral: Any, other: Any
) -> None:
    for value in (neutral, None):
        response = server.chat(**{name: value})
        assert response.status_code == 200 and "x-ignored-params" not in response.headers
    error = server.complete(**{name: other}).json()
    assert (error["param"], error["error"]["code"]) == (name, "unsupported_parameter")
