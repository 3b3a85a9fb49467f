"""POST /v1/completions."""

from __future__ import annotations

import re

import msgspec
import pytest

from helpers.http_server import EOS, Server, events_of


def test_the_answer_has_the_documented_shape(server: Server) -> None:
    body = server.complete().json()
    assert re.fullmatch(r"cmpl-[0-9a-f]{32}", body.pop("id"))
    assert body.pop("created") > 1_700_000_000
    assert body == {
        "object": "text_completion",
        "model": "default",
        "choices": [
            {
                "index": 0,
                "text": "Hello there.",
                "logprobs": None,
                "finish_reason": "stop",
                "matched_stop": EOS,
            }
        ],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 13,
            "total_tokens": 15,
            "prompt_tokens_details": None,
        },
    }


def test_all_four_shapes_of_a_prompt_mean_the_same(server: Server) -> None:
    ids = server.ids("Hi é")
    for prompt in ("Hi é", ["Hi é"], ids, [ids], [float(i) for i in ids]):
        assert server.complete(prompt=prompt).status_code == 200
    assert len({request.prompt for request in server.engine.submitted}) == 1


def test_choices_are_ordered_by_prompt_then_sample(server: Server) -> None:
    server.set_reply(lambda request, choice: [*server.ids(server.prompt_text(request) + str(choice)), EOS])
    for stream in (False, True):
        response = server.complete(prompt=["a", "bb", "ccc"], n=2, stream=stream)
        texts = [""] * 6
        if stream:
            for event in events_of(response):
                (choice,) = event["choices"]
                texts[choice["index"]] += choice["text"]
        else:
            for choice in response.json()["choices"]:
                texts[choice["index"]] += choice["text"]
            assert response.json()["usage"] == {
                "prompt_tokens": 6,
                "completion_tokens": 2 * (3 + 4 + 5),
                "total_tokens": 30,
                "prompt_tokens_details": None,
            }
        assert texts == ["a0", "a1", "bb0", "bb1", "ccc0", "ccc1"]


def test_request_ids_of_one_call_differ(server: Server) -> None:
    server.complete(prompt=["a", "b"])
    assert len({request.request_id for request in server.engine.submitted}) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_in_front(server: Server, stream: bool) -> None:
    response = server.complete(prompt=["é ", server.ids("b")], echo=True, max_tokens=2, stream=stream)
    if stream:
        texts = ["", ""]
        for event in events_of(response):
            texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    else:
        texts = [choice["text"] for choice in response.json()["choices"]]
    assert texts == ["é He", "bHe"]


def test_echo_with_max_tokens_zero_gives_the_prompt_alone(server: Server) -> None:
    body = server.complete(prompt="abc", echo=True, max_tokens=0).json()
    assert body["choices"][0]["text"] == "abc"
    assert body["usage"]["completion_tokens"] == 0


def test_logprobs_are_parallel_lists_that_index_the_text(server: Server) -> None:
    server.set_reply("añb")
    (choice,) = server.complete(logprobs=1).json()["choices"]
    logprobs = choice["logprobs"]
    assert logprobs["text_offset"] == [0, 1, 1, 2]
    assert logprobs["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xb1", "b"]
    assert len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == 4
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == logprob


def test_logprobs_zero_reports_the_token_itself(server: Server) -> None:
    (choice,) = server.complete(logprobs=0, max_tokens=1).json()["choices"]
    assert choice["logprobs"] == {
        "text_offset": [0],
        "token_logprobs": [-0.5],
        "tokens": ["H"],
        "top_logprobs": [{"H": -0.5}],
    }


def test_a_stream_carries_the_same_logprobs(server: Server) -> None:
    whole = server.complete(logprobs=2).json()["choices"][0]["logprobs"]
    parts = [event["choices"][0]["logprobs"] for event in events_of(server.complete(logprobs=2, stream=True))]
    for name, values in whole.items():
        assert [value for part in parts for value in part[name]] == values


def test_a_stream_ends_each_choice_with_its_last_text(server: Server) -> None:
    events = list(
        events_of(server.complete(stream=True, max_tokens=3, stream_options={"include_usage": True}))
    )
    choices = [event["choices"][0] for event in events[:-1]]
    assert [(c["text"], c["finish_reason"]) for c in choices] == [("H", None), ("e", None), ("l", "length")]
    assert {event["object"] for event in events} == {"text_completion"}
    assert events[-1]["usage"]["completion_tokens"] == 3


def test_the_default_limit_is_sixteen(server: Server) -> None:
    server.set_reply("x" * 40)
    response = server.complete()
    assert response.json()["usage"]["completion_tokens"] == 16
    assert response.headers["x-default-max-tokens"] == "16"


def test_best_of_n_is_accepted(server: Server) -> None:
    assert server.complete(best_of=1).status_code == 200
    assert server.complete(n=2, best_of=2).status_code == 200


def test_cached_tokens_count_each_prompt_once(server: Server) -> None:
    server.engine.cached_tokens = 4
    body = server.complete(prompt=["a", "b"], n=3, return_cached_tokens_details=True).json()
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 8}


def test_the_sdk(server: Server) -> None:
    answer = server.sdk().completions.create(model="default", prompt="Once upon a time", max_tokens=100)
    assert answer.choices[0].text == "Hello there."
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_more_choices_than_the_engine_ever_takes(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = msgspec.structs.replace(server.engine.ready, max_running_requests=2, max_queued_requests=3)
    monkeypatch.setattr(server.engine, "ready", ready)
    assert server.complete(prompt=["x"] * 5, max_tokens=1).status_code == 200
    response = server.complete(prompt=["x"] * 3, n=2, max_tokens=1)
    assert response.status_code == 400
    assert "at most 5 can be served" in response.json()["message"]
    assert response.json()["param"] == "n"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hidden", [True, False])
def test_offsets_point_into_the_text_beside_special_tokens(
    server: Server, stream: bool, hidden: bool
) -> None:
    """With ignore_eos special tokens come in the middle of a text, and mostly do not show in it."""
    server.set_reply(lambda _request, _choice: [*server.ids("aé"), EOS, EOS, *server.ids("☃b"), 66])
    response = server.complete(
        prompt="x",
        echo=True,
        logprobs=0,
        ignore_eos=True,
        max_tokens=9,
        skip_special_tokens=hidden,
        stream=stream,
    )
    parts = [e["choices"][0] for e in events_of(response)] if stream else response.json()["choices"]
    text = "".join(part["text"] for part in parts)
    offsets = [
        offset for part in parts for offset in (part["logprobs"] or {"text_offset": []})["text_offset"]
    ]
    if hidden:
        assert text.startswith("xaé☃b")
        assert offsets[:10] == [0, 1, 2, 2, 3, 3, 3, 3, 3, 4]
    else:
        assert text.startswith("xaé<end><end>☃b")
        assert offsets[:10] == [0, 1, 2, 2, 3, 8, 13, 13, 13, 14]
