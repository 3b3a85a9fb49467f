"""POST /tokenize and /detokenize."""

from __future__ import annotations

import json
from typing import Any

import pytest

from helpers.http_server import Server

MESSAGES = [{"role": "user", "content": "Hi"}]
ALIASES = ("", "/v1")


@pytest.mark.parametrize("prefix", ALIASES)
def test_a_text_there_and_back(server: Server, prefix: str) -> None:
    for text in ("Hello, wörld 🌍", "", " a\n\nb\t", "x" * 20_000):
        answer = server.post(f"{prefix}/tokenize", {"prompt": text}).json()
        assert answer == {"tokens": server.ids(text), "count": len(text.encode()), "max_model_len": 2048}
        for tokens in (answer["tokens"], [float(token) for token in answer["tokens"]]):
            back = server.post(f"{prefix}/detokenize", {"tokens": tokens})
            assert back.json() == {"text": text}


def test_lists_of_texts(server: Server) -> None:
    answer = server.post("/tokenize", {"model": "default", "prompt": ["a", "", "bcd"]}).json()
    assert (answer["tokens"], answer["count"]) == ([server.ids(t) for t in ("a", "", "bcd")], [1, 0, 3])
    assert server.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"text": ["a", "", "bcd"]}
    empty = server.post("/tokenize", {"prompt": []}).json()
    assert (empty["tokens"], empty["count"]) == ([], [])
    assert server.post("/detokenize", {"tokens": []}).json() == {"text": ""}


def test_a_conversation_is_what_chat_would_compute(server: Server) -> None:
    for extra in ({}, {"add_generation_prompt": False}, {"chat_template_kwargs": {"suffix": "!"}}):
        answer = server.post("/tokenize", {"messages": MESSAGES, **extra}).json()
        server.chat(messages=MESSAGES, **extra)
        computed = server.engine.submitted[-1].prompt_ids.tolist()
        assert (answer["tokens"], answer["count"]) == (computed, len(computed))


def test_special_tokens_are_left_out_unless_wanted(server: Server) -> None:
    tokens = [*server.ids("ab"), 0]
    assert server.post("/detokenize", {"tokens": tokens}).json() == {"text": "ab"}
    kept = server.post("/detokenize", {"tokens": tokens, "skip_special_tokens": False})
    assert kept.json() == {"text": "ab<end>"}


def test_unknown_fields_are_named(server: Server) -> None:
    for path, body in (
        ("/tokenize", {"prompt": "a", "promt": 1}),
        ("/tokenize", {"messages": MESSAGES, "promt": 1}),
        ("/detokenize", {"tokens": [1], "promt": 1}),
    ):
        assert server.post(path, body).headers["x-ignored-params"] == "promt"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("tokenize", {}, "prompt"),
        ("tokenize", {"prompt": None}, "prompt"),
        ("tokenize", {"prompt": 3}, "prompt"),
        ("tokenize", {"prompt": {"a": 1}}, "prompt"),
        ("tokenize", {"prompt": ["a", 3]}, "prompt"),
        ("tokenize", {"prompt": [[1]]}, "prompt"),
        ("tokenize", {"prompt": ["a"] * 1025}, "prompt"),
        ("tokenize", {"prompt": "a", "add_special_tokens": "yes"}, "add_special_tokens"),
        ("tokenize", {"prompt": "a", "model": 3}, "model"),
        ("tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("tokenize", {"messages": []}, "messages"),
        ("tokenize", {"messages": "a"}, "messages"),
        ("tokenize", {"messages": [{"role": "user"}]}, "messages[0].content"),
        ("tokenize", {"prompt": "a" * (2048 * 512 + 1)}, None),
        ("detokenize", {}, "tokens"),
        ("detokenize", {"tokens": "abc"}, "tokens"),
        ("detokenize", {"tokens": 5}, "tokens"),
        ("detokenize", {"tokens": [-1]}, "tokens"),
        ("detokenize", {"tokens": [257]}, "tokens"),
        ("detokenize", {"tokens": [2**70]}, "tokens"),
        ("detokenize", {"tokens": [1, "2"]}, "tokens"),
        ("detokenize", {"tokens": [True]}, "tokens"),
        ("detokenize", {"tokens": [1.5]}, "tokens"),
        ("detokenize", {"tokens": [1, [2]]}, "tokens"),
        ("detokenize", {"tokens": [[1], 2]}, "tokens"),
        ("detokenize", {"tokens": [[1], [300]]}, "tokens"),
        ("detokenize", {"tokens": [None]}, "tokens"),
        ("detokenize", {"tokens": [1], "skip_special_tokens": 1}, "skip_special_tokens"),
    ],
)
def test_refusals_name_the_field(server: Server, path: str, body: dict[str, Any], param: str | None) -> None:
    for prefix in ALIASES:
        response = server.post(f"{prefix}/{path}", body)
        assert response.status_code == 400, response.text[:300]
        assert response.json()["param"] == response.json()["error"]["param"] == param


def test_models_and_bodies_are_checked(server: Server) -> None:
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        response = server.post(path, {**body, "model": "nope"})
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
        response = server.http.post(path, content=b"{", headers={"content-type": "application/json"})
        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")
        assert server.get(path).status_code == 405
    assert server.post("/tokenize", {"messages": MESSAGES, "model": "nope"}).status_code == 404
    content = json.dumps({"prompt": "a"}).encode()
    headers = {"content-type": "text/plain"}
    assert server.http.post("/tokenize", content=content, headers=headers).status_code == 415
