"""Several keys: from a file, with limits of their own, and one that manages the server."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from engine.config.api_keys import ApiKey, read_api_keys
from engine.config.server_config import ServerConfig
from engine.errors import ConfigError
from engine.server import auth
from engine.server.error_map import HttpError
from engine.server.rate_limits import RateLimits
from helpers.http_server import Server, wait_until

FILE = """
[team-a]
key = "secret-a"
weight = 2.5

[few-requests]
key = "secret-r"
requests_per_minute = 3

[few-tokens]
key = "secret-t"
tokens_per_minute = 1000
"""
CHAT = {
    "model": "default",
    "messages": [{"role": "user", "content": "x" * 95}],
}  # 100 tokens with the template
PROMPT_LEN = 100


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    path.write_text(FILE)
    return path


@pytest.fixture
def keyed(model_dir: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """No time goes by in which a minute's allowance is refilled, however slow the machine is."""
    monkeypatch.setattr(auth, "RateLimits", functools.partial(RateLimits, clock=lambda: 0.0))
    config = ServerConfig(api_key=("plain",), api_key_file=str(key_file), admin_api_key="boss")
    with Server(model_dir, config=config) as server:
        yield server


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_a_file_of_keys(key_file: Path) -> None:
    keys = read_api_keys(("x", "x", "y"), str(key_file))
    assert [(key.name, key.weight) for key in keys] == [
        ("key-1", 1),
        ("key-2", 1),
        ("team-a", 2.5),
        ("few-requests", 1),
        ("few-tokens", 1),
    ]
    assert "secret" not in repr(keys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[a]\nkey = "secret-1" x', "is not valid TOML"),
        ('a = "secret"', "expected tables like [name]"),
        ("[a]\nweight = 1", "[a] has no key"),
        ('[a]\nkey = "k"\nrpm = 5', "[a] has an unknown field 'rpm'"),
        ('[a]\nkey = ""', "the key of a must be a text"),
        ("[a]\nkey = 5", "the key of a must be a text"),
        ('[a]\nkey = "k"\nweight = 0', "the weight of a must be"),
        ('[a]\nkey = "k"\nweight = true', "the weight of a must be"),
        ('[a]\nkey = "k"\nweight = nan', "the weight of a must be"),
        ('[a]\nkey = "k"\nrequests_per_minute = 0', "requests_per_minute of a must be"),
        ('[a]\nkey = "k"\ntokens_per_minute = 1.5', "tokens_per_minute of a must be"),
        ('["a b"]\nkey = "k"', "'a b' is no name for a key"),
        ('[a]\nkey = "k"\n[b]\nkey = "k"', "two keys have the same key"),
        ('[a]\nkey = "first"', "two keys have the same key"),
        ('[key-1]\nkey = "k"', "two keys have the same name"),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_api_keys(("first",), str(path))
    assert message in caught.value.message
    assert "secret" not in caught.value.message


def test_a_missing_file() -> None:
    with pytest.raises(ConfigError, match="cannot read --api-key-file nowhere.toml: No such file"):
        read_api_keys((), "nowhere.toml")


def test_the_admin_key_is_no_ordinary_one() -> None:
    with pytest.raises(ConfigError, match="must differ"):
        ServerConfig(api_key=("a",), admin_api_key="a")
    with pytest.raises(ConfigError, match="must not be empty"):
        ServerConfig(admin_api_key=" ")


def test_the_engine_knows_whose_request_it_is(keyed: Server) -> None:
    for key, name, weight in (("plain", "key-1", 1), ("secret-a", "team-a", 2.5), ("boss", "admin", 1)):
        assert keyed.post("/v1/chat/completions", CHAT, headers=bearer(key)).status_code == 200
        request = keyed.engine.submitted[-1]
        assert (request.client, request.weight) == (name, weight)
    assert keyed.post("/v1/chat/completions", CHAT, headers=bearer("other")).status_code == 401


@pytest.mark.parametrize("path", ["/flush_cache", "/flush_cache/", "/abort_request"])
def test_management_takes_the_admin_key_alone(keyed: Server, path: str) -> None:
    def status(**headers: str) -> tuple[int, str]:
        response = keyed.post(path, {"rid": "x"}, headers=headers)
        return response.status_code, response.text

    assert status()[0] == 401
    assert status(**bearer("wrong"))[0] == 401
    code, text = status(**bearer("secret-a"))
    assert code == 403 and '"admin_required"' in text
    assert status(**bearer("boss"))[0] == 200


def test_an_admin_key_alone_leaves_the_rest_open(model_dir: Path) -> None:
    with Server(model_dir, config=ServerConfig(admin_api_key="boss")) as server:
        assert server.chat().status_code == 200
        assert server.post("/flush_cache", None).status_code == 401
        assert server.post("/flush_cache", None, headers=bearer("boss")).status_code == 200


def test_requests_per_minute(keyed: Server) -> None:
    left = []
    for _ in range(3):
        answer = keyed.post("/v1/chat/completions", CHAT, headers=bearer("secret-r"))
        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-limit-requests"] == "3"
        left.append(answer.headers["x-ratelimit-remaining-requests"])
    assert left == ["2", "1", "0"]
    assert answer.headers["x-ratelimit-reset-requests"] == "60.000s"
    with pytest.raises(openai.RateLimitError) as caught:
        keyed.sdk("secret-r").chat.completions.create(**CHAT)
    headers = caught.value.response.headers
    assert caught.value.code == "rate_limit_exceeded"
    assert (headers["retry-after"], headers["retry-after-ms"]) == ("20", "20000")
    assert len(keyed.engine.submitted) == 3
    assert keyed.get("/v1/models", headers=bearer("secret-r")).status_code == 200
    assert keyed.post("/v1/chat/completions", CHAT, headers=bearer("plain")).status_code == 200


def test_tokens_per_minute_are_reserved_and_given_back(keyed: Server) -> None:
    def ask(**fields: object) -> tuple[int, int]:
        answer = keyed.post("/v1/chat/completions", {**CHAT, **fields}, headers=bearer("secret-t"))
        return answer.status_code, int(answer.headers["x-ratelimit-remaining-tokens"])

    keyed.set_reply("12345")  # and an end token: six
    status, _ = ask(max_tokens=800)
    assert status == 200
    keyed.wait_idle()
    status, left = ask(max_tokens=901)  # may never fit
    assert (status, left) == (429, 1000 - PROMPT_LEN - 6)
    status, left = ask(max_tokens=850)  # does not fit now
    assert (status, left) == (429, 1000 - PROMPT_LEN - 6)
    keyed.call(lambda: setattr(keyed.engine, "refuse_with", HttpError(503, "a", "b", "c")))
    assert ask(max_tokens=100)[0] == 503
    assert keyed.call(lambda: keyed.engine.submitted[-1].params.max_tokens) == 800
    keyed.call(lambda: setattr(keyed.engine, "refuse_with", None))
    assert ask(max_tokens=100, n=2)[0] == 200
    wait_until(lambda: ask(max_tokens=901)[1] == 1000 - 2 * PROMPT_LEN - 6 - 12)


def test_a_minute_is_refilled_evenly() -> None:
    now = 0.0
    limits = RateLimits(60, 600, lambda: now)
    for _ in range(60):
        limits.take_request()
    with pytest.raises(HttpError) as caught:
        limits.take_request()
    assert (caught.value.status, caught.value.headers["retry-after-ms"]) == (429, "1000")
    now += 1
    limits.take_request()
    limits.take_tokens(600)
    limits.give_back(500)
    assert limits.headers()["x-ratelimit-remaining-tokens"] == "500"
    now += 1000
    assert limits.headers()["x-ratelimit-remaining-tokens"] == "600"
    limits.give_back(5000)
    assert limits.headers()["x-ratelimit-remaining-tokens"] == "600"
    with pytest.raises(HttpError) as caught:
        limits.take_tokens(601)
    assert caught.value.headers["x-should-retry"] == "false"


def test_a_key_is_hidden_in_its_own_description() -> None:
    assert "secret" not in repr(ApiKey(name="a", key="secret"))
    assert "secret" not in repr(ServerConfig(api_key=("secret",), admin_api_key="secret2"))
