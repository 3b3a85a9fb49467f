"""POST /v1/completions with echo and logprobs: what evaluation harnesses ask."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.http_server import Server, events_of

LISTS = ("text_offset", "token_logprobs", "tokens", "top_logprobs")


def collect(response: Any, num_choices: int) -> list[dict[str, Any]]:
    """The choices of a stream, put together as a whole answer has them."""
    choices = [
        {"text": "", "logprobs": {name: [] for name in LISTS}, "events": []} for _ in range(num_choices)
    ]
    for event in events_of(response):
        (part,) = event["choices"]
        choice = choices[part["index"]]
        choice["text"] += part["text"]
        choice["events"].append(part)
        for name in LISTS:
            choice["logprobs"][name] += (part["logprobs"] or {name: []})[name]
    return choices


@pytest.mark.parametrize("wanted", [0, 1, 5, 20])
@pytest.mark.parametrize("as_ids", [False, True])
def test_scoring_a_prompt_generates_nothing(server: Server, wanted: int, as_ids: bool) -> None:
    prompt = server.ids("añ b") if as_ids else "añ b"
    body = server.complete(prompt=prompt, echo=True, logprobs=wanted, max_tokens=0).json()
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("añ b", "length")
    assert body["usage"]["completion_tokens"] == 0
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xb1", " ", "b"]
    assert logprobs["text_offset"] == [0, 1, 1, 2, 3]
    assert logprobs["token_logprobs"] == [None, -1, -1.125, -1.25, -1.375]
    assert logprobs["top_logprobs"][0] is None
    scored = zip(*(logprobs[name][1:] for name in ("tokens", "token_logprobs", "top_logprobs")), strict=True)
    for token, own, top in scored:
        assert top[token] == own
        assert len(top) == wanted + 1, "the token itself is there though it is not among the best"


@pytest.mark.parametrize("n", [1, 3])
def test_prompt_and_output_are_one_sequence(server: Server, n: int) -> None:
    fields = {"prompt": ["Hello", "a b"], "echo": True, "logprobs": 2, "max_tokens": 3, "n": n}
    whole = server.complete(**fields).json()["choices"]
    assert [choice["index"] for choice in whole] == list(range(2 * n))
    for choice in whole:
        prompt = "Hello" if choice["index"] < n else "a b"
        assert choice["text"] == prompt + "Hel"
        logprobs = choice["logprobs"]
        assert {len(logprobs[name]) for name in LISTS} == {len(prompt) + 3}
        assert [choice["text"][offset] for offset in logprobs["text_offset"]] == logprobs["tokens"]
        assert logprobs["token_logprobs"][len(prompt) :] == [-0.5] * 3
    streamed = collect(server.complete(**fields, stream=True), 2 * n)
    for choice, parts in zip(whole, streamed, strict=True):
        assert (parts["text"], parts["logprobs"]) == (choice["text"], choice["logprobs"])
        first, *_, last = parts["events"]
        assert first["text"] == choice["text"][:-3]
        assert first["logprobs"]["token_logprobs"][0] is None
        assert last["finish_reason"] == "length"
        assert [part["finish_reason"] for part in parts["events"][:-1]] == [None] * (len(parts["events"]) - 1)


def test_a_prompt_of_one_token(server: Server) -> None:
    for stream in (False, True):
        response = server.complete(prompt="a", echo=True, logprobs=1, max_tokens=0, stream=stream)
        (choice,) = collect(response, 1) if stream else response.json()["choices"]
        assert choice["text"] == "a"
        assert choice["logprobs"] == {
            "text_offset": [0],
            "token_logprobs": [None],
            "tokens": ["a"],
            "top_logprobs": [None],
        }


def test_special_tokens_count_where_the_text_spells_them(server: Server) -> None:
    (spelled,) = server.complete(prompt="a<end>b", echo=True, logprobs=0, max_tokens=0).json()["choices"]
    assert spelled["text"] == "a<end>b"
    assert spelled["logprobs"]["text_offset"] == [0, 1, 6]
    (given,) = server.complete(prompt=server.ids("a<end>b"), echo=True, logprobs=0, max_tokens=0).json()[
        "choices"
    ]
    assert given["text"] == "ab"
    assert given["logprobs"]["text_offset"] == [0, 1, 1]


def test_only_an_echo_with_logprobs_asks_for_scores(server: Server) -> None:
    for fields in ({"echo": True}, {"logprobs": 2}, {"echo": True, "logprobs": 2}):
        server.complete(**fields)
    wanted = [request.params.prompt_logprobs for request in server.engine.submitted]
    assert wanted == [None, None, 2]


def test_a_prompt_that_fills_the_context_can_be_scored(server: Server) -> None:
    ids = server.ids("x" * server.context_length)
    fields = {"echo": True, "logprobs": 0}
    (choice,) = server.complete(prompt=ids, max_tokens=0, **fields).json()["choices"]
    assert len(choice["logprobs"]["tokens"]) == server.context_length
    for prompt, max_tokens in ((ids, 1), ([*ids, 5], 0)):
        error = server.complete(prompt=prompt, max_tokens=max_tokens, **fields).json()["error"]
        assert error["code"] == "context_length_exceeded"


def test_an_answer_of_scores_without_end_is_refused(server: Server) -> None:
    response = server.complete(prompt=["x" * 1000] * 5, n=10, echo=True, logprobs=20, max_tokens=0)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "logprobs"
    assert not server.engine.submitted


# --- token ids and seeds


def test_completions_return_token_ids(server: Server) -> None:
    fields = {"prompt": ["Hi", "é"], "return_token_ids": True, "n": 2}
    whole = server.complete(**fields).json()["choices"]
    for choice in whole:
        assert choice["token_ids"] == [*server.ids("Hello there."), 0]
    told = [choice.get("prompt_token_ids") for choice in whole]
    assert told == [server.ids("Hi"), None, server.ids("é"), None], "once for each prompt"
    for echo in ({}, {"echo": True}, {"echo": True, "logprobs": 1}):
        parts: list[list[Any]] = [[] for _ in range(4)]
        for event in events_of(server.complete(**fields, **echo, stream=True)):
            parts[event["choices"][0]["index"]].append(event["choices"][0])
        for choice, own in zip(whole, parts, strict=True):
            assert [t for part in own for t in part.get("token_ids", [])] == choice["token_ids"]
            assert own[0].get("prompt_token_ids") == choice.get("prompt_token_ids")
            assert not any("prompt_token_ids" in part for part in own[1:])


def test_chat_returns_token_ids(server: Server) -> None:
    whole = server.chat(return_token_ids=True, n=2).json()
    assert whole["prompt_token_ids"] == server.ids("u:Hi;a:")
    events = list(events_of(server.chat(return_token_ids=True, n=2, stream=True)))
    assert [event.get("prompt_token_ids") for event in events] == [whole["prompt_token_ids"]] + [None] * (
        len(events) - 1
    )
    for choice in whole["choices"]:
        assert choice["token_ids"] == [*server.ids("Hello there."), 0]
        own = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        assert [t for part in own for t in part.get("token_ids", [])] == choice["token_ids"]


def test_token_ids_of_a_stop_string_are_all_there(server: Server) -> None:
    (choice,) = server.complete(stop="lo", return_token_ids=True).json()["choices"]
    assert (choice["text"], choice["token_ids"]) == ("Hel", server.ids("Hello"))


def test_nobody_gets_token_ids_unasked(server: Server) -> None:
    for response in (
        server.chat(),
        server.complete(),
        server.chat(stream=True),
        server.complete(stream=True),
    ):
        assert b"token_ids" not in response.content


def test_the_seed_that_was_drawn_is_returned(server: Server) -> None:
    for stream in (False, True):
        assert server.chat(stream=stream).headers["x-seed"] == "4711"
        seeds = server.complete(prompt=["a", "b"], stream=stream).headers["x-seed"].split(",")
        assert int(seeds[1]) == int(seeds[0]) + 1, "of two prompts, one after the other"
        assert "x-seed" not in server.complete(seed=5, stream=stream).headers
