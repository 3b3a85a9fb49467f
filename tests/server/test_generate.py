"""POST /generate: the native API of SGLang, as its bench tools and scripts speak it."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from engine.server.generate_schema import SAMPLING_NAMES
from helpers.http_server import EOS, Server, events_of, wait_until


def ask(server: Server, **fields: Any) -> httpx.Response:
    return server.post("/generate", {"text": "Hi", **fields})


def result(server: Server, **fields: Any) -> Any:
    response = ask(server, **fields)
    assert response.status_code == 200, response.text
    return response.json()


def test_one_prompt_one_object(server: Server) -> None:
    body = result(server, sampling_params={"max_new_tokens": 100}, rid="mine")
    assert body["text"] == "Hello there."
    assert body["output_ids"] == [*server.ids("Hello there."), EOS]
    meta_info = body["meta_info"]
    assert meta_info.pop("e2e_latency") > 0
    assert meta_info == {
        "id": "mine",
        "finish_reason": {"type": "stop", "matched": EOS},
        "prompt_tokens": 2,
        "completion_tokens": 13,
        "cached_tokens": 0,
        "weight_version": "default",
        "seed": 4711,
    }


def test_token_ids_are_prompts_too(server: Server) -> None:
    for input_ids in ([40, 41], [[40, 41]]):
        body = result(server, text=None, input_ids=input_ids)
        assert isinstance(body, dict) == (input_ids == [40, 41])
    assert [request.prompt_ids.tolist() for request in server.engine.submitted] == [[40, 41]] * 2


def test_lists_of_prompts_and_choices(server: Server) -> None:
    server.set_reply(lambda request, choice: [*server.ids(f"{server.prompt_text(request)}{choice}"), EOS])
    several = result(server, text=["a", "b"], sampling_params={"n": 2, "max_new_tokens": 9}, rid=["x", "y"])
    assert [one["text"] for one in several] == ["a0", "a1", "b0", "b1"]
    assert [one["meta_info"]["id"] for one in several] == ["x", "x", "y", "y"]
    (alone,) = result(server, text=["a"])
    assert alone["text"] == "a0"
    both = result(server, text="a", sampling_params={"n": 2})
    assert [one["text"] for one in both] == ["a0", "a1"]


def test_each_prompt_may_have_parameters_of_its_own(server: Server) -> None:
    several = result(
        server,
        text=["a", "b", "c"],
        sampling_params=[{"max_new_tokens": 1}, {"max_new_tokens": 2, "stop": "e"}, {"temperature": 0.5}],
        return_logprob=[False, True, False],
        top_logprobs_num=[0, 2, 0],
        rid="all",
    )
    assert [one["text"] for one in several] == ["H", "H", "Hello there."]
    reasons = [one["meta_info"]["finish_reason"] for one in several]
    assert reasons[0] == {"type": "length", "length": 1}
    assert reasons[1] == {"type": "stop", "matched": "e"}
    assert ["output_top_logprobs" in one["meta_info"] for one in several] == [False, True, False]
    assert [one["meta_info"]["id"] for one in several] == ["all_0", "all_1", "all_2"]
    params = [request.params for request in server.engine.submitted]
    assert [p.temperature for p in params] == [1, 1, 0.5]
    assert [p.logprobs for p in params] == [None, 2, None]


def test_sampling_parameters_reach_the_engine(server: Server) -> None:
    given = {
        "max_new_tokens": 7, "min_new_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "min_p": 0.1,
        "frequency_penalty": 0.2, "presence_penalty": 0.3, "repetition_penalty": 1.1, "stop": ["x"],
        "stop_token_ids": [9], "ignore_eos": True, "skip_special_tokens": False, "no_stop_trim": True,
        "sampling_seed": 12, "logit_bias": {"5": 1},
    }  # fmt: skip
    result(server, sampling_params=given, priority=3, extra_key="k", cache_salt="s")
    (request,) = server.engine.submitted
    params = request.params
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "ignore_eos"):
        assert getattr(params, name) == given[name]
    assert (params.max_tokens, params.min_tokens, params.seed) == (7, 2, 12)
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("x",), (9,), {5: 1})
    assert params.include_stop and not params.skip_special_tokens
    assert request.priority == 3 and request.namespace


def test_defaults(server: Server) -> None:
    result(server)
    result(server, sampling_params=None)
    result(server, sampling_params={name: None for name in SAMPLING_NAMES})
    first, *others = (request.params for request in server.engine.submitted)
    assert others == [first] * 2
    assert (first.max_tokens, first.temperature, first.logprobs) == (128, 1, None)


# --- log-probabilities


def test_log_probabilities_of_the_output(server: Server) -> None:
    fields = {"return_logprob": True, "sampling_params": {"max_new_tokens": 3}}
    meta_info = result(server, **fields)["meta_info"]
    ids = server.ids("Hel")
    assert meta_info["output_token_logprobs"] == [[-0.5, token_id, None] for token_id in ids]
    assert meta_info["input_token_logprobs"] == []
    assert "output_top_logprobs" not in meta_info
    meta_info = result(server, **fields, top_logprobs_num=2, return_text_in_logprobs=True)["meta_info"]
    assert [entry[2] for entry in meta_info["output_token_logprobs"]] == list("Hel")
    assert meta_info["output_top_logprobs"][0] == [[-0.5, ids[0], "H"], [-1.5, ids[0] + 1, "I"]]


def test_the_stop_token_and_a_cut_stop_string_have_scores_too(server: Server) -> None:
    body = result(server, return_logprob=True, sampling_params={"stop": "there"})
    assert body["text"] == "Hello "
    scored = [token_id for _, token_id, _ in body["meta_info"]["output_token_logprobs"]]
    assert scored == body["output_ids"] == server.ids("Hello there")
    body = result(server, return_logprob=True)
    assert len(body["meta_info"]["output_token_logprobs"]) == len(body["output_ids"]) == 13


@pytest.mark.parametrize("start", [0, 2, 4, 5])
@pytest.mark.parametrize("stream", [False, True])
def test_prompts_are_scored_from_a_position_on(server: Server, start: int, stream: bool) -> None:
    response = ask(
        server,
        text="añ b",
        return_logprob=True,
        logprob_start_len=start,
        top_logprobs_num=1,
        sampling_params={"max_new_tokens": 0},
        stream=stream,
    )
    assert response.status_code == 200, response.text
    body = list(events_of(response))[-1] if stream else response.json()
    ids = server.ids("añ b")
    expected = [[None, ids[0], None], *([-1 - i / 8, token_id, None] for i, token_id in enumerate(ids[1:]))]
    meta_info = body["meta_info"]
    assert meta_info["input_token_logprobs"] == expected[start:]
    assert len(meta_info["input_top_logprobs"]) == 5 - start
    assert (meta_info["input_top_logprobs"] or [None])[0] is None or start
    assert (body["text"], meta_info["completion_tokens"]) == ("", 0)
    assert meta_info["output_token_logprobs"] == []


# --- streams


def test_events_hold_all_so_far(server: Server) -> None:
    events = list(events_of(ask(server, stream=True, sampling_params={"max_new_tokens": 4})))
    assert [event["text"] for event in events] == ["H", "He", "Hel", "Hell"]
    assert [event["output_ids"] for event in events] == [server.ids("Hell")[: i + 1] for i in range(4)]
    assert [event["meta_info"]["completion_tokens"] for event in events] == [1, 2, 3, 4]
    assert [event["meta_info"]["finish_reason"] for event in events[:-1]] == [None] * 3
    assert events[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 4}
    assert len({event["meta_info"]["id"] for event in events}) == 1
    assert not any("index" in event for event in events)


def test_or_what_is_new(server: Server) -> None:
    fields = {"incremental_streaming_output": True, "return_logprob": True}
    events = list(events_of(ask(server, stream=True, **fields)))
    whole = result(server, return_logprob=True)
    assert "".join(event["text"] for event in events) == whole["text"]
    for read in (lambda e: e["output_ids"], lambda e: e["meta_info"]["output_token_logprobs"]):
        assert [item for event in events for item in read(event)] == read(whole)
    assert [event["meta_info"]["completion_tokens"] for event in events] == list(range(1, 14))


def test_events_of_several_say_whose_they_are(server: Server) -> None:
    response = ask(server, text=["a", "b"], stream=True, sampling_params={"n": 2, "stream_interval": 5})
    last = {event["index"]: event for event in events_of(response)}
    assert sorted(last) == [0, 1, 2, 3]
    assert {event["text"] for event in last.values()} == {"Hello there."}
    (only,) = {e["index"] for e in events_of(ask(server, text=["a"], stream=True))}
    assert only == 0


def test_half_a_character_is_held_back(server: Server) -> None:
    server.set_reply("añ☃")
    texts = [event["text"] for event in events_of(ask(server, stream=True))]
    assert texts[-1] == "añ☃" and "�" not in "".join(texts)


# --- names and aborts


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_of_a_batch_is_aborted_by_its_name(server: Server, stream: bool) -> None:
    server.call(server.engine.hold)
    try:
        with server.http.stream(
            "POST", "/generate", json={"text": ["a", "b"], "rid": ["x", "y"], "stream": True}
        ) as response:
            wait_until(lambda: server.call(lambda: len(server.engine.running)) == 2)
            assert ask(server, rid="x").status_code == 400, "the name is taken"
            assert server.post("/abort_request", {"rid": "x"}).json() == {"aborted": 1}
            server.call(server.engine.release)
            response.read()
            last = {event["index"]: event["meta_info"]["finish_reason"] for event in events_of(response)}
    finally:
        server.call(server.engine.release)
    assert last == {0: {"type": "abort", "message": "Aborted"}, 1: {"type": "stop", "matched": EOS}}


def test_all_are_aborted_as_one_request(server: Server) -> None:
    server.call(server.engine.hold)
    try:
        with server.http.stream("POST", "/generate", json={"text": ["a", "b"], "stream": True}) as response:
            wait_until(lambda: server.call(lambda: len(server.engine.running)) == 2)
            assert server.post("/abort_request", {"abort_all": True}).json() == {"aborted": 1}
            assert {e["meta_info"]["finish_reason"]["type"] for e in _read(response)} == {"abort"}
    finally:
        server.call(server.engine.release)


def _read(response: httpx.Response) -> list[Any]:
    response.read()
    return list(events_of(response))


# --- what bench tools send


def test_the_body_of_sglangs_bench_serving(server: Server) -> None:
    """Its reader takes text and meta_info.completion_tokens of each event."""
    body = {
        "text": "Hi",
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True},
        "stream": True,
        "lora_path": None,
        "return_logprob": False,
        "return_routed_experts": False,
        "logprob_start_len": -1,
    }
    response = server.post("/generate", body)
    assert "x-ignored-params" not in response.headers
    events = list(events_of(response))
    assert [event["meta_info"]["completion_tokens"] for event in events if event["text"]] == list(range(1, 9))
    assert server.post("/flush_cache", {}).status_code == 200
    assert server.get("/v1/models").json()["data"][0]["id"]


def test_the_body_of_sglangs_bench_one_batch_server(server: Server) -> None:
    body = {
        "input_ids": [[40, 41, 42]] * 4,
        "sampling_params": {
            "temperature": 0.0,
            "max_new_tokens": 6,
            "ignore_eos": True,
            "json_schema": None,
            "stream_interval": None,
        },
        "return_logprob": False,
        "stream": True,
    }
    counts = {
        e["index"]: e["meta_info"]["completion_tokens"] for e in events_of(server.post("/generate", body))
    }
    assert counts == dict.fromkeys(range(4), 6)
    (state,) = server.get("/server_info").json()["internal_states"]
    assert state["effective_max_running_requests_per_dp"] > 0
    assert state["memory_usage"]["token_capacity"] > 0


def test_an_answer_may_be_constrained(server: Server) -> None:
    for name in ("regex", "ebnf", "json_schema"):
        response = ask(server, sampling_params={name: "x"})
        assert "x-ignored-params" not in response.headers
        constraint = server.engine.submitted[-1].params.constraint
        assert (constraint.kind, constraint.text) == (name, "x")
    assert ask(server, sampling_params={"regex": "a", "ebnf": "b"}).status_code == 400


# --- refusals


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"text": None}, "text"),
        ({"text": ""}, "text"),
        ({"text": []}, "text"),
        ({"text": ["a", ""]}, "text"),
        ({"text": 7}, "text"),
        ({"text": [[1, 2]]}, "text"),
        ({"input_ids": [1]}, "input_ids"),
        ({"text": None, "input_ids": "abc"}, "input_ids"),
        ({"text": None, "input_ids": []}, "input_ids"),
        ({"text": None, "input_ids": [[]]}, "input_ids"),
        ({"text": None, "input_ids": [1, 300]}, "input_ids"),
        ({"text": None, "input_ids": [[1], [-1]]}, "input_ids"),
        ({"text": None, "input_ids": [1.5]}, "input_ids"),
        ({"text": ["a"] * 1025}, "text"),
        ({"sampling_params": []}, "sampling_params"),
        ({"sampling_params": 7}, "sampling_params"),
        ({"sampling_params": [{}, {}]}, "sampling_params"),
        ({"text": ["a", "b"], "sampling_params": [{"n": 1}, {"n": 2}]}, "sampling_params"),
        ({"text": ["a"] * 1000, "sampling_params": {"n": 100}}, "sampling_params.n"),
        ({"text": ["a"] * 1000, "sampling_params": [{"n": 100}] * 1000}, "sampling_params"),
        ({"sampling_params": {"max_new_tokens": -1}}, "sampling_params.max_new_tokens"),
        ({"sampling_params": {"max_new_tokens": 5000}}, "sampling_params.max_new_tokens"),
        ({"sampling_params": {"max_new_tokens": "5"}}, "sampling_params.max_new_tokens"),
        ({"sampling_params": {"min_new_tokens": 9, "max_new_tokens": 8}}, "sampling_params.min_new_tokens"),
        ({"sampling_params": {"temperature": -1}}, "sampling_params.temperature"),
        ({"sampling_params": {"top_p": 0}}, "sampling_params.top_p"),
        ({"sampling_params": {"n": 0}}, "sampling_params.n"),
        ({"sampling_params": {"sampling_seed": 2**63}}, "sampling_params.sampling_seed"),
        ({"sampling_params": {"stop": [""]}}, "sampling_params.stop"),
        ({"sampling_params": {"stop_token_ids": [999]}}, "sampling_params.stop_token_ids"),
        ({"sampling_params": {"stop_regex": "a"}}, "sampling_params.stop_regex"),
        ({"sampling_params": {"beam_width": 2}}, "sampling_params.beam_width"),
        ({"sampling_params": {"custom_params": {"a": 1}}}, "sampling_params.custom_params"),
        ({"return_logprob": "yes"}, "return_logprob"),
        ({"return_logprob": [True, True]}, "return_logprob"),
        ({"top_logprobs_num": 3}, "top_logprobs_num"),
        ({"logprob_start_len": 0}, "logprob_start_len"),
        ({"return_logprob": True, "logprob_start_len": -2}, "logprob_start_len"),
        ({"return_logprob": True, "logprob_start_len": 3}, "logprob_start_len"),
        ({"return_logprob": True, "top_logprobs_num": 21}, "top_logprobs_num"),
        ({"return_logprob": True, "top_logprobs_num": -1}, "top_logprobs_num"),
        ({"return_logprob": True, "token_ids_logprob": [1]}, "token_ids_logprob"),
        ({"image_data": "x.png"}, "image_data"),
        ({"input_embeds": [[0.5]]}, "input_embeds"),
        ({"session_params": {"id": "a"}}, "session_params"),
        ({"return_hidden_states": True}, "return_hidden_states"),
        ({"custom_logit_processor": "{}"}, "custom_logit_processor"),
        ({"rid": ["a", "b"]}, "rid"),
        ({"rid": ""}, "rid"),
        ({"rid": "x" * 257}, "rid"),
        ({"text": ["a", "b"], "rid": ["a", "a"]}, "rid"),
        ({"stream": "yes"}, "stream"),
        ({"priority": 1.5}, "priority"),
    ],
)
def test_what_is_wrong_is_named(server: Server, fields: dict[str, Any], param: str) -> None:
    response = ask(server, **fields)
    error = response.json()
    assert (response.status_code, error["param"]) == (400, param), error
    assert param.split(".")[-1] in error["message"] or "context length" in error["message"]
    assert not server.engine.submitted


def test_a_long_batch_of_scores_is_refused(server: Server) -> None:
    many = {"text": None, "input_ids": [[40] * 1000] * 60, "return_logprob": True, "logprob_start_len": 0}
    for sampling_params in ({"max_new_tokens": 0}, [{"max_new_tokens": 0}] * 60):
        response = ask(server, **many, top_logprobs_num=20, sampling_params=sampling_params)
        assert (response.status_code, response.json()["param"]) == (400, "top_logprobs_num")


def test_unknown_models_and_fields(server: Server) -> None:
    assert ask(server, model="nobody").status_code == 404
    response = ask(server, sampling_params={"max_tokens": 3}, wrong=1)
    assert response.headers["x-ignored-params"] == "wrong,sampling_params.max_tokens"
