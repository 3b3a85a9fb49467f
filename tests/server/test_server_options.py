"""Flags that change how requests are read and how answers are written."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from engine.config.server_config import ServerConfig
from engine.core.output_processor import TextDelta
from engine.errors import ConfigError, InternalError
from engine.server.stream_interval import in_intervals
from helpers.http_server import MODEL_PATH, Server, events_of

HI: list[Any] = [{"role": "user", "content": "Hi"}]


# --- --strict-params


@pytest.fixture(scope="module")
def strict(model_dir: Path) -> Iterator[Server]:
    with Server(model_dir, config=ServerConfig(strict_params=True)) as server:
        yield server


@pytest.mark.parametrize(
    ("path", "fields", "named", "hint"),
    [
        ("/v1/chat/completions", {"max_token": 5}, "max_token", "max_tokens"),
        ("/v1/chat/completions", {"stream_options": {"x": 1}}, "stream_options.x", ""),
        ("/v1/completions", {"temprature": 1}, "temprature", "temperature"),
        ("/tokenize", {"promt": "x", "messages": None}, "promt", "prompt"),
        ("/tokenize", {"prompt": None, "messages": HI, "temprature": 1}, "temprature", "temperature"),
        ("/detokenize", {"skip_special_token": True}, "skip_special_token", "skip_special_tokens"),
        ("/abort_request", {"zzz": 1}, "zzz", ""),
    ],
)
def test_strict_refuses_unknown_fields(strict: Server, path: str, fields: Any, named: str, hint: str) -> None:
    required = {"model": "default", "prompt": "x", "tokens": [1], "rid": "x"}
    known = {
        "/v1/chat/completions": {"model": "default", "messages": HI},
        "/v1/completions": {"model": "default", "prompt": "x"},
    }
    body = known.get(path) or {n: v for n, v in required.items() if n in _needed(path)}
    response = strict.post(path, {**body, **fields})
    error = response.json()
    assert response.status_code == 400
    assert (error["error"]["code"], error["param"]) == ("unknown_parameter", named)
    assert ("did you mean" in error["message"]) == bool(hint)
    assert hint in error["message"]
    assert not strict.engine.submitted
    assert strict.post(path, body).status_code == 200
    strict.reset()


def _needed(path: str) -> tuple[str, ...]:
    return {"/tokenize": ("model", "prompt"), "/detokenize": ("model", "tokens")}.get(path, ("rid",))


def test_strict_takes_known_fields_and_nulls(strict: Server) -> None:
    response = strict.post(
        "/v1/chat/completions", {"model": "default", "messages": HI, "top_k": 3, "seed": None}
    )
    assert response.status_code == 200
    strict.sdk().chat.completions.create(model="default", messages=HI, max_completion_tokens=3)


def test_strict_takes_what_openai_keeps_for_the_account(strict: Server) -> None:
    """Clients send it with everything; the answer says that nothing came of it."""
    response = strict.chat(metadata={"a": "b"}, store=True, service_tier="auto")
    assert response.status_code == 200
    assert response.headers["x-ignored-params"] == "metadata,store,service_tier"
    refusal = strict.chat(metadata={"a": "b"}, stroe=True)
    assert refusal.status_code == 400 and refusal.json()["param"] == "stroe"


def test_ignored_fields_are_counted(server: Server) -> None:
    def count() -> float:
        lines = server.get("/metrics").text.splitlines()
        return next(
            float(line.split()[1]) for line in lines if line.startswith("engine:ignored_fields_total")
        )

    before = count()
    server.chat(max_token=1, temprature=2)
    server.chat()
    assert count() == before + 2


# --- --error-format


@pytest.mark.parametrize("shape", ["both", "flat", "openai"])
def test_errors_in_each_format(model_dir: Path, shape: str) -> None:
    with Server(model_dir, config=ServerConfig(error_format=shape)) as server:
        for response in (server.chat(temperature=-1), server.get("/nothing"), server.get("/v1/models/x")):
            _check_error(response.json(), shape, response.status_code)
        with pytest.raises(openai.BadRequestError) as caught:
            server.sdk().chat.completions.create(model="default", messages=HI, temperature=-1)
        assert caught.value.type == "invalid_request_error"
        assert "temperature must be non-negative" in caught.value.message
        server.call(lambda: setattr(server.engine, "fail_with", InternalError("x")))
        *_, last = events_of(server.chat(stream=True))
        _check_error(last, shape, 500)


def _check_error(body: dict[str, Any], shape: str, status: int) -> None:
    names = {"object", "message", "type", "param", "code"}
    expected = {"both": names | {"error"}, "flat": names, "openai": {"error"}}[shape]
    assert set(body) == expected
    if shape != "openai":
        assert (body["object"], body["code"]) == ("error", status)
    if shape != "flat":
        assert set(body["error"]) == names and isinstance(body["error"]["code"], str)


# --- --allow-any-model-name


def test_any_model_name_is_answered_where_allowed(model_dir: Path) -> None:
    with Server(model_dir, config=ServerConfig(allow_any_model_name=True)) as server:
        answer = server.sdk().chat.completions.create(model="gpt-4o", messages=HI)
        assert answer.model == "gpt-4o"
        assert server.complete(model="x/y:z").json()["model"] == "x/y:z"
        assert server.chat(model=None).status_code == 400, "it must still be named"
        assert server.chat(model=7).status_code == 400
        assert [card["id"] for card in server.get("/v1/models").json()["data"]] == [MODEL_PATH]
        assert server.get("/v1/models/gpt-4o").status_code == 404


# --- --stream-interval and --sse-keep-alive-s


@pytest.fixture(scope="module")
def fourfold(model_dir: Path) -> Iterator[Server]:
    with Server(model_dir, config=ServerConfig(stream_interval=4)) as server:
        yield server


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("extra", [{}, {"logprobs": 1}, {"n": 3, "return_token_ids": True}])
def test_events_hold_several_tokens(
    fourfold: Server, server: Server, path: str, extra: dict[str, Any]
) -> None:
    body = {"model": "default", "messages": HI, "prompt": "Hi", "stream": True, "max_tokens": 12, **extra}
    if path == "/v1/chat/completions" and "logprobs" in extra:
        body["logprobs"] = True
    plain, joined = [_read(events_of(s.post(path, body))) for s in (server, fourfold)]
    for index, choice in plain.items():
        assert "".join(choice["texts"]) == "".join(joined[index]["texts"])
        for name in ("ids", "scores", "ends"):
            assert joined[index][name] == choice[name]
        lengths = list(map(len, filter(None, joined[index]["texts"])))
        assert lengths == [1, 4, 4, 3], "the first token at once, then four at a time"
        assert list(map(len, filter(None, choice["texts"]))) == [1] * 12


def _read(events: Iterator[dict[str, Any]]) -> dict[int, dict[str, list[Any]]]:
    choices: dict[int, dict[str, list[Any]]] = {}
    for event in events:
        for part in event["choices"]:
            own = choices.setdefault(part["index"], {"texts": [], "ids": [], "scores": [], "ends": []})
            own["texts"].append(part.get("text") or part.get("delta", {}).get("content") or "")
            own["ids"] += part.get("token_ids", [])
            scores = part["logprobs"] or {}
            own["scores"] += scores.get("content", scores.get("token_logprobs", []))
            if part["finish_reason"]:
                own["ends"].append((part["finish_reason"], part["matched_stop"]))
    return choices


def test_what_is_held_back_comes_before_an_error() -> None:
    async def deltas() -> AsyncIterator[tuple[int, TextDelta]]:
        for text in "abcd":
            yield 0, TextDelta(text, [], 1)
        raise InternalError("x")

    async def run() -> list[str]:
        texts = []
        with pytest.raises(InternalError):
            async for _, delta in in_intervals(deltas(), 8):
                texts.append(delta.text)
        return texts

    assert asyncio.run(run()) == ["a", "bcd"]


def test_a_stream_may_have_no_comments(model_dir: Path) -> None:
    with Server(model_dir, config=ServerConfig(sse_keep_alive_s=0)) as server:
        assert len(list(events_of(server.chat(stream=True)))) > 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sse_keep_alive_s", -1.0),
        ("sse_keep_alive_s", float("nan")),
        ("stream_interval", 0),
        ("stream_interval", 2000),
        ("error_format", "xml"),
    ],
)
def test_wrong_values_name_the_flag(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match="--" + field.replace("_", "-")):
        ServerConfig(**{field: value})


# --- headers of streams


@pytest.mark.parametrize("fields", [{}, {"echo": True, "logprobs": 1}])
def test_a_text_stream_begins_with_its_admission(server: Server, fields: dict[str, Any]) -> None:
    server.call(server.engine.hold)
    try:
        with server.http.stream(
            "POST", "/v1/completions", json={"model": "default", "prompt": "x", "stream": True, **fields}
        ) as response:
            assert response.status_code == 200
            assert "x-seed" in response.headers
            server.call(server.engine.release)
            assert b"[DONE]" in response.read()
    finally:
        server.call(server.engine.release)
