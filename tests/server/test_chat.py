"""POST /v1/chat/completions, through the openai SDK and as raw JSON."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import openai
import pytest

from helpers.http_server import EOS, MODEL_PATH, Server, events_of, wait_until

HI: list[Any] = [{"role": "user", "content": "Hi"}]


def test_the_answer_has_the_documented_shape(server: Server) -> None:
    body = server.chat(model=MODEL_PATH, max_tokens=100).json()
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", body.pop("id"))
    assert body.pop("created") > 1_700_000_000
    assert body == {
        "object": "chat.completion",
        "model": MODEL_PATH,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello there."},
                "logprobs": None,
                "finish_reason": "stop",
                "matched_stop": EOS,
            }
        ],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": 13,
            "total_tokens": 20,
            "prompt_tokens_details": None,
        },
    }


def test_the_prompt_is_the_rendered_template(server: Server) -> None:
    server.chat(
        messages=[
            {"role": "system", "content": "S"},
            {"role": "developer", "content": "D"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None},
            {"role": "user", "content": None},
            {"role": "assistant"},
            {"role": "tool", "content": "T", "tool_call_id": "1"},
            {"role": "function", "content": "F", "name": "f"},
        ],
        chat_template_kwargs={"suffix": "!"},
    )
    (request,) = server.engine.submitted
    assert server.prompt_text(request) == "s:S;s:D;u:ab;a:;u:;a:;t:T;t:F;a:!"


def test_continue_final_message_leaves_the_last_turn_open(server: Server) -> None:
    server.chat(messages=[*HI, {"role": "assistant", "content": "Well"}], continue_final_message=True)
    assert server.prompt_text(server.engine.submitted[0]) == "u:Hi;a:Well"


def test_every_parameter_reaches_the_engine(server: Server) -> None:
    asked = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "frequency_penalty": -1,
        "presence_penalty": 1.5,
        "repetition_penalty": 1.25,
        "seed": -5,
        "max_tokens": 50,
        "min_tokens": 2,
        "ignore_eos": True,
        "skip_special_tokens": False,
    }
    server.chat(
        **asked,
        stop_token_ids=[9, 8],
        logprobs=True,
        top_logprobs=3,
        logit_bias={"5": -100, "6": 1.5},
        stop=["x", "yz"],
        no_stop_trim=True,
        n=2,
    )
    (request,) = server.engine.submitted
    params = request.params
    for name, value in asked.items():
        assert getattr(params, name) == value, name
    assert params.stop_token_ids == (9, 8)
    assert params.logprobs == 3
    assert params.logit_bias == {5: -100.0, 6: 1.5}
    assert params.stop == ("x", "yz")
    assert params.include_stop
    assert request.n == 2


def test_null_means_unset_for_every_optional_field(server: Server) -> None:
    names = [
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
        "seed",
        "max_tokens",
        "max_completion_tokens",
        "min_tokens",
        "n",
        "stop",
        "stop_token_ids",
        "logit_bias",
        "logprobs",
        "top_logprobs",
        "stream",
        "stream_options",
        "response_format",
        "tools",
        "tool_choice",
        "regex",
        "lora_path",
        "ignore_eos",
        "skip_special_tokens",
        "return_cached_tokens_details",
        "cache_salt",
        "user",
        "chat_template_kwargs",
        "continue_final_message",
    ]
    plain, nulls = server.chat(), server.chat(**dict.fromkeys(names))
    assert nulls.status_code == 200, nulls.text
    first, second = server.engine.submitted
    assert (first.params, first.n, first.namespace) == (second.params, second.n, second.namespace)
    assert plain.json()["choices"] == nulls.json()["choices"]


def test_defaults_are_those_of_the_api(server: Server) -> None:
    server.chat()
    params = server.engine.submitted[0].params
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (1.0, 1.0, -1, 16)
    assert (params.frequency_penalty, params.presence_penalty, params.seed, params.logprobs) == (
        0,
        0,
        None,
        None,
    )


def test_a_whole_number_may_be_written_as_a_float(server: Server) -> None:
    assert server.chat(max_tokens=3.0, n=1.0).status_code == 200
    assert server.engine.submitted[0].params.max_tokens == 3


def test_the_default_limit_is_reported_when_it_cuts(server: Server) -> None:
    server.set_reply("x" * 40)
    cut = server.chat()
    assert cut.headers["x-default-max-tokens"] == "16"
    assert cut.json()["choices"][0]["finish_reason"] == "length"
    assert "x-default-max-tokens" not in server.chat(max_tokens=5).headers
    assert "x-default-max-tokens" not in server.chat(max_completion_tokens=5).headers
    server.set_reply("short")
    assert "x-default-max-tokens" not in server.chat().headers


def test_max_completion_tokens_wins(server: Server) -> None:
    server.chat(max_tokens=9, max_completion_tokens=4)
    assert server.engine.submitted[0].params.max_tokens == 4


def test_max_tokens_zero_gives_an_empty_answer(server: Server) -> None:
    (choice,) = server.chat(max_tokens=0).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "length")


def test_choices_have_their_own_text_and_index(server: Server) -> None:
    server.set_reply(lambda _request, choice: [*server.ids("abc"[choice] * (choice + 1)), EOS])
    body = server.chat(n=3).json()
    assert [c["message"]["content"] for c in body["choices"]] == ["a", "bb", "ccc"]
    assert [c["index"] for c in body["choices"]] == [0, 1, 2]
    assert body["usage"]["prompt_tokens"] == 7
    assert body["usage"]["completion_tokens"] == 2 + 3 + 4


def test_logprobs_spell_the_text_byte_by_byte(server: Server) -> None:
    server.set_reply("é🙂!")
    (choice,) = server.chat(logprobs=True, top_logprobs=2, max_tokens=50).json()["choices"]
    content = choice["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "é🙂!"
    assert content[-1]["token"] == "!"
    for entry in content:
        assert entry["logprob"] <= 0 and math.isfinite(entry["logprob"])
        assert len(entry["top_logprobs"]) == 2
        assert set(entry["top_logprobs"][0]) == {"token", "bytes", "logprob"}


def test_logprobs_without_alternatives(server: Server) -> None:
    entries = server.chat(logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in entries] == [[]] * 12


def test_a_stream_has_one_id_a_role_and_an_end_for_each_choice(server: Server) -> None:
    server.set_reply(lambda _request, choice: [*server.ids("a" * (choice + 1)), EOS])
    response = server.chat(stream=True, n=3)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    events = list(events_of(response))
    assert len({event["id"] for event in events}) == 1
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert all(event["choices"] and "usage" not in event for event in events)
    for index in range(3):
        mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in mine) == "a" * (index + 1)
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + ["stop"]
        assert mine[-1]["delta"] == {}
        assert mine[-1]["matched_stop"] == EOS
    # Each choice ends on its own, not when all have.
    ends = [i for i, event in enumerate(events) if event["choices"][0]["finish_reason"]]
    assert ends[0] < max(i for i, e in enumerate(events) if e["choices"][0]["index"] == 2 and i not in ends)


def test_usage_of_a_stream_comes_last_and_equals_that_of_the_whole_answer(server: Server) -> None:
    whole = server.chat().json()["usage"]
    events = list(events_of(server.chat(stream=True, stream_options={"include_usage": True})))
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole
    assert all(event["usage"] is None for event in events[:-1])


def test_continuous_usage_counts_up(server: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = list(events_of(server.chat(stream=True, stream_options=options)))
    counts = [event["usage"]["completion_tokens"] for event in events[1:]]
    assert counts == sorted(counts)
    assert counts[-1] == 13
    server.engine.cached_tokens = 1
    events = list(
        events_of(server.chat(stream=True, stream_options=options, return_cached_tokens_details=True))
    )
    assert all(event["usage"]["prompt_tokens_details"] == {"cached_tokens": 1} for event in events[1:])


def test_min_tokens_lifts_a_limit_that_nobody_asked_for(server: Server) -> None:
    server.set_reply("x" * 100)
    response = server.chat(min_tokens=30)
    assert response.json()["usage"]["completion_tokens"] == 30
    assert response.headers["x-default-max-tokens"] == "30"
    assert server.chat(min_tokens=2**40).json()["param"] == "min_tokens"
    assert server.chat(min_tokens=30, max_tokens=29).json()["param"] == "min_tokens"


def test_stream_logprobs_are_those_of_the_whole_answer(server: Server) -> None:
    server.set_reply("né 🙂")
    whole = server.chat(logprobs=True, top_logprobs=1).json()["choices"][0]["logprobs"]["content"]
    events = events_of(server.chat(logprobs=True, top_logprobs=1, stream=True))
    pieces = [event["choices"][0]["logprobs"] for event in events]
    assert [entry for piece in pieces if piece for entry in piece["content"]] == whole


def test_a_stream_never_holds_half_a_character(server: Server) -> None:
    server.set_reply("日本語 🙂 e\u0301")
    events = list(events_of(server.chat(stream=True, max_tokens=100)))
    pieces = [event["choices"][0]["delta"].get("content", "") for event in events]
    assert "".join(pieces) == "日本語 🙂 e\u0301"
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("stream", [False, True])
def test_the_earliest_stop_string_ends_the_text(server: Server, stream: bool) -> None:
    server.set_reply("one two three")
    response = server.chat(stop=["three", "wo t", "o th"], stream=stream, max_tokens=50)
    if stream:
        choices = [event["choices"][0] for event in events_of(response)]
        text = "".join(c["delta"].get("content", "") for c in choices)
        last = choices[-1]
    else:
        (last,) = response.json()["choices"]
        text = last["message"]["content"]
    assert (text, last["finish_reason"], last["matched_stop"]) == ("one t", "stop", "wo t")
    assert server.engine.cancelled_choices, "the engine was not told that the choice is complete"


def test_include_stop_keeps_the_stop_string(server: Server) -> None:
    for name in ("no_stop_trim", "include_stop_str_in_output"):
        body = server.chat(stop="lo", **{name: True}).json()
        assert body["choices"][0]["message"]["content"] == "Hello"


def test_cached_tokens_are_null_unless_asked_for(server: Server) -> None:
    server.engine.cached_tokens = 5
    assert server.chat().json()["usage"]["prompt_tokens_details"] is None
    body = server.chat(return_cached_tokens_details=True, n=2).json()
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 5}
    assert body["sglext"] == {"cached_tokens_details": {"device": 5, "host": 0}}


def test_cached_tokens_in_streams(server: Server) -> None:
    server.engine.cached_tokens = 5
    details = {"cached_tokens_details": {"device": 5, "host": 0}}
    events = list(events_of(server.chat(return_cached_tokens_details=True, stream=True, n=2)))
    assert [event.get("sglext") for event in events] == [None] * (len(events) - 1) + [details]
    assert all(event["choices"] for event in events)
    options = {"include_usage": True}
    events = list(
        events_of(server.chat(return_cached_tokens_details=True, stream=True, stream_options=options))
    )
    assert events[-1]["sglext"] == details
    assert events[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 5}


def test_cache_salts_separate_namespaces(server: Server) -> None:
    for salt, key in ((None, None), ("a", None), ("b", None), (None, "a"), ("a", "b"), ("ab", None)):
        server.chat(cache_salt=salt, extra_key=key)
    namespaces = [request.namespace for request in server.engine.submitted]
    assert namespaces[0] == ""
    assert len(set(namespaces)) == 6


def test_unknown_fields_are_named_in_a_header(server: Server) -> None:
    response = server.chat(
        max_token=5,
        user="me",
        messages=[{"role": "user", "content": [{"type": "text", "text": "Hi", "cache": 1}], "nmae": 1}] * 2,
        stream_options={"include_obfuscation": False},
        **{"evil\r\nx-a: b": 1, "é,": 2},
    )
    assert response.status_code == 200
    names = response.headers["x-ignored-params"].split(",")
    assert sorted(names) == sorted(
        [
            "max_token",
            "messages.nmae",
            "messages.content.cache",
            "stream_options.include_obfuscation",
            "evil%0D%0Ax-a%3A%20b",
            "%C3%A9%2C",
        ]
    )
    assert "x-ignored-params" not in server.chat().headers


def test_max_tokens_default_is_cut_to_the_context(server: Server) -> None:
    server.chat(messages=[{"role": "user", "content": "x" * 2035}])
    (request,) = server.engine.submitted
    assert len(request.prompt_ids) + request.params.max_tokens == 2048


def test_the_sdk_streams(server: Server) -> None:
    server.set_reply("Once upon a time.")
    stream = server.sdk().chat.completions.create(model=MODEL_PATH, messages=HI, stream=True, max_tokens=50)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "Once upon a time."


def test_the_sdk_sees_the_request_id(server: Server) -> None:
    answer = server.sdk().chat.completions.create(
        model="default", messages=HI, extra_headers={"x-request-id": "trace-1.2:3"}
    )
    assert answer._request_id == "trace-1.2:3"
    with pytest.raises(openai.BadRequestError) as caught:
        server.sdk().chat.completions.create(model="default", messages=HI, temperature=-1)
    assert caught.value.request_id.startswith("req-")


def test_prompt_text_never_reaches_the_log(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", logger="engine"):
        server.chat(messages=[{"role": "user", "content": "my secret"}])
        server.set_reply("another secret")
        server.chat(stream=True)
        wait_until(lambda: sum('"completion_tokens"' in line for line in caplog.messages) == 2)
    lines = caplog.messages
    logged = [json.loads(line) for line in lines if line.startswith("{")]
    assert [line["completion_tokens"] for line in logged] == [13, 15]
    assert not any("secret" in line for line in lines)


def test_events_are_json_on_one_line_whatever_the_text(server: Server) -> None:
    text = 'a"\\\n\r\u2028\x00</script>\t'
    server.set_reply(text)
    response = server.chat(stream=True, max_tokens=100)
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events_of(response)) == text
    assert json.loads(server.chat(max_tokens=100).content)["choices"][0]["message"]["content"] == text
