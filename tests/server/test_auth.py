"""API keys: who is let in, and what never leaks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from engine.config.server_config import ServerConfig
from helpers.http_server import Server

KEYS = ("first-key", "zweiter-schlüssel")
CHAT = {"model": "default", "messages": [{"role": "user", "content": "x"}]}


@pytest.fixture(scope="module")
def guarded(model_dir: Path) -> Iterator[Server]:
    with Server(model_dir, config=ServerConfig(api_key=KEYS)) as server:
        yield server


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens_in_both_headers(guarded: Server, key: str) -> None:
    for headers in (
        {"authorization": f"Bearer {key}"},
        {"authorization": f"bearer   {key}"},
        {"x-api-key": key},
    ):
        encoded = {name: value.encode() for name, value in headers.items()}
        assert guarded.post("/v1/chat/completions", CHAT, headers=encoded).status_code == 200


@pytest.mark.parametrize(
    ("headers", "slug"),
    [
        ({}, "missing_api_key"),
        ({"authorization": "first-key"}, "missing_api_key"),
        ({"authorization": "Basic first-key"}, "missing_api_key"),
        ({"authorization": "Bearer"}, "missing_api_key"),
        ({"authorization": "Bearer wrong"}, "invalid_api_key"),
        ({"authorization": "Bearer first-key2"}, "invalid_api_key"),
        ({"authorization": "Bearer first-ke"}, "invalid_api_key"),
        ({"authorization": "Bearer FIRST-KEY"}, "invalid_api_key"),
        ({"authorization": b"Bearer \xff\xfe"}, "invalid_api_key"),
        ({"authorization": "Bearer schlüssel".encode()}, "invalid_api_key"),
        ({"x-api-key": "wrong"}, "invalid_api_key"),
    ],
)
def test_wrong_keys(guarded: Server, headers: dict[str, str | bytes], slug: str) -> None:
    response = guarded.post("/v1/chat/completions", CHAT, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    body = response.json()
    assert body["type"] == "authentication_error"
    assert (body["code"], body["error"]["code"]) == (401, slug)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/health", 200),
        ("/metrics", 200),
        ("/ready", 200),
        ("/healthy", 401),
        ("/health/x", 401),
        ("/v1/models", 401),
        ("/v1/models/default", 401),
        ("/get_model_info", 401),
        ("/nope", 401),
        ("/", 401),
    ],
)
def test_exactly_three_paths_are_open(guarded: Server, path: str, status: int) -> None:
    response = guarded.get(path)
    assert response.status_code == status
    if status != 200:
        assert response.json()["error"]["object"] == "error"


def test_the_key_is_checked_before_the_body_and_the_route(guarded: Server) -> None:
    assert guarded.http.post("/v1/chat/completions", content=b"{").status_code == 401
    assert guarded.http.delete("/v1/models").status_code == 401


def test_the_sdk(guarded: Server) -> None:
    assert guarded.sdk(KEYS[0]).models.list().data
    with pytest.raises(openai.AuthenticationError) as caught:
        guarded.sdk("wrong").models.list()
    assert caught.value.code == "invalid_api_key"


def test_keys_show_nowhere(guarded: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        headers = {"authorization": f"Bearer {KEYS[0]}"}
        texts = [
            guarded.get(path, headers=headers).text for path in ("/get_model_info", "/v1/models", "/nope")
        ]
        guarded.get("/v1/models", headers={"authorization": "Bearer other-key"})
    mine = [record.getMessage() for record in caplog.records if record.name.startswith("engine")]
    assert not any(key in text for key in (*KEYS, "other-key") for text in [*texts, *mine])
    assert KEYS[0] not in repr(ServerConfig(api_key=KEYS))


def test_without_keys_any_header_will_do(server: Server) -> None:
    assert (
        httpx.get(f"{server.url}/v1/models", headers={"authorization": "Bearer whatever"}).status_code == 200
    )


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET / HTTP/9.9\r\n\r\n", b"400"),
        (
            b"POST /v1/completions HTTP/1.1\r\nauthorization: Bearer first-key\r\ncontent-length: -5\r\n\r\n",
            b"400",
        ),
        (b"GET / HTTP/1.1\r\nauthorization: Bearer first-key\r\nx: " + b"y" * 20_000 + b"\r\n\r\n", b"413"),
        (b"NONE /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", b"401"),
    ],
    ids=["version", "length", "headers", "a method of that name"],
)
def test_what_cannot_be_read_is_not_blamed_on_the_key(guarded: Server, data: bytes, status: bytes) -> None:
    answer = guarded.raw(data)
    assert answer.split(b" ")[1] == status, answer
    assert (b"api_key" in answer) == (status == b"401")
