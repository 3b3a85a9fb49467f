"""GET /v1/models, /v1/models/{id}, /get_model_info and /health."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from urllib.parse import quote

import pytest

from engine.config.server_config import ServerConfig
from engine.errors import ConfigError
from engine.server.model_files import ModelFiles
from helpers.http_server import MODEL_PATH, Server, write_model
from helpers.kept_waiting import kept_waiting_s

NAMES = ("org/model-a", "plain", "with:colon", "/abs/path", "per%cent", "spaced name")


def test_every_listed_id_can_be_retrieved(model_dir: Path) -> None:
    with Server(model_dir, config=ServerConfig(served_model_name=NAMES)) as server:
        listed = server.sdk().models.list().data
        assert [model.id for model in listed] == list(NAMES)
        for model in listed:
            card = server.sdk().models.retrieve(model.id)
            assert card.id == model.id
            assert card.object == "model"
            assert card.created == model.created
            assert card.max_model_len == 2048
            assert server.get("/v1/models/" + quote(model.id, safe="")).json()["id"] == model.id
        for name in ("org/model-a", "/abs/path", "with:colon"):
            assert server.get("/v1/models/" + name).json()["id"] == name
        for name in (*NAMES, MODEL_PATH, "default"):
            assert server.chat(model=name).json()["model"] == name
        assert server.get("/v1/models/default").json()["id"] == NAMES[0]
        for unknown in ("org", "org/model", "org/model-a/", "PLAIN", "../x", "%00", "*"):
            response = server.get("/v1/models/" + quote(unknown, safe=""))
            assert response.status_code == 404, unknown
            assert response.json()["error"]["code"] == "model_not_found"
            assert response.json()["message"].endswith("has " + ", ".join(map(repr, NAMES)) + ".")


def test_the_served_name_defaults_to_the_model_path(server: Server) -> None:
    (card,) = server.get("/v1/models").json()["data"]
    assert card["id"] == card["root"] == MODEL_PATH
    assert card["parent"] is None


def test_model_info(model_dir: Path) -> None:
    config = ServerConfig(api_key=("hidden-key",), enable_cache_report=True, default_max_tokens_chat=None)
    with Server(model_dir, config=config) as server:
        headers = {"authorization": "Bearer hidden-key"}
        response = server.get("/get_model_info", headers=headers)
        info = response.json()
        assert info == server.get("/model_info", headers=headers).json()
        assert "hidden-key" not in response.text
    expected = {
        "model_path": MODEL_PATH,
        "served_model_name": MODEL_PATH,
        "tokenizer_path": MODEL_PATH,
        "is_generation": True,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 257,
        "context_length": 2048,
        "max_model_len": 2048,
        "dtype": "float32",
        "kv_cache_dtype": "float32",
        "device": "cpu",
        "max_running_requests": 8,
        "max_total_tokens": 8192,
        "page_size": 16,
        "schedule_policy": "fcfs",
        "enable_cache_report": True,
        "default_max_tokens": None,
        "default_sampling_params": {
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        },
        "load_format": "auto",
        "quantization": None,
        "weight_version": "default",
        "version": "0.1.0",
    }
    assert {name: info[name] for name in expected} == expected
    assert info["lora"] == {
        "enabled": True,
        "max_loras_per_batch": 8,
        "max_loaded_loras": 32,
        "max_lora_rank": 256,
        "adapters": [],
    }
    assert info["started_at"] > 1_700_000_000


def test_a_server_can_report_cached_tokens_to_everybody(model_dir: Path) -> None:
    with Server(model_dir, config=ServerConfig(enable_cache_report=True)) as server:
        for body in (server.chat().json(), server.complete().json()):
            assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
            assert "sglext" not in body


def test_chat_may_run_to_the_end_of_the_context(model_dir: Path) -> None:
    with Server(model_dir, config=ServerConfig(default_max_tokens_chat=None), reply="x" * 50) as server:
        response = server.chat()
        assert response.json()["usage"]["completion_tokens"] == 51
        assert "x-default-max-tokens" not in response.headers
        assert server.complete().json()["usage"]["completion_tokens"] == 16


def test_sampling_defaults_come_from_the_model_for_both_endpoints(tmp_path: Path) -> None:
    directory = write_model(tmp_path, temperature=0.25, top_k=7, eos_token_id=0)
    with Server(directory) as server:
        server.chat()
        server.complete()
        server.chat(temperature=1, top_k=-1)
        first, second, third = (request.params for request in server.engine.submitted)
        assert (first.temperature, first.top_k) == (second.temperature, second.top_k) == (0.25, 7)
        assert (third.temperature, third.top_k) == (1.0, -1)
        defaults = server.get("/get_model_info").json()["default_sampling_params"]
        assert (defaults["temperature"], defaults["top_k"], defaults["top_p"]) == (0.25, 7, 1.0)


def test_what_the_server_prefers_comes_before_the_model_but_after_the_request(tmp_path: Path) -> None:
    directory = write_model(tmp_path, temperature=0.25, top_k=7, eos_token_id=0)
    preferred = {"temperature": 0.5, "min_p": 0.1}
    for defaults, expected in (
        (json.dumps(preferred), (0.5, 7, 0.1)),
        ("model", (0.25, 7, 0)),
        ("openai", (1, -1, 0)),
    ):
        with Server(directory, config=ServerConfig(sampling_defaults=defaults)) as server:
            server.chat()
            server.complete()
            server.chat(temperature=2, top_k=1, min_p=0)
            *unset, chosen = (request.params for request in server.engine.submitted)
            for params in unset:
                assert (params.temperature, params.top_k, params.min_p) == expected
            assert (chosen.temperature, chosen.top_k, chosen.min_p) == (2, 1, 0)
            info = server.get("/get_model_info").json()
        assert info["preferred_sampling_params"] == (preferred if defaults.startswith("{") else None)
        shown = info["default_sampling_params"]
        assert (shown["temperature"], shown["top_k"], shown["min_p"]) == expected


@pytest.mark.parametrize(
    ("defaults", "words"),
    [
        ('{"temperature": -1}', "temperature must be non-negative"),
        ('{"temperature": "hot"}', "temperature has the wrong type"),
        ('{"top_k": null}', "top_k has the wrong type"),
        ('{"max_tokens": 5}', "'max_tokens'"),
        ("[]", "must be model or openai, or a JSON object"),
        ("{", "must be model or openai, or a JSON object"),
        ("Model", "must be model or openai, or a JSON object"),
    ],
)
def test_wrong_preferences_name_the_flag(model_dir: Path, defaults: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        Server(model_dir, config=ServerConfig(sampling_defaults=defaults))
    assert caught.value.message.startswith("--sampling-defaults")


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_p": "high"}, {"top_k": 1.5}])
def test_unusable_sampling_defaults_are_left_out(
    tmp_path: Path, bad: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    with Server(write_model(tmp_path, **bad)) as server:
        assert server.chat().status_code == 200
    assert "generation_config.json is not used" in caplog.text


def test_health_is_fast_while_requests_run(server: Server) -> None:
    assert server.get("/health").json() == {"status": "ok"}
    server.get("/health")
    times = []
    for _ in range(20):
        start, waited_s = time.perf_counter(), kept_waiting_s(os.getpid())
        assert server.get("/health").status_code == 200
        times.append(time.perf_counter() - start - (kept_waiting_s(os.getpid()) - waited_s))
    assert min(times) < 0.005  # others use the machine as well: the least is what it takes by itself


def test_health_waits_for_the_models_text_side(model_dir: Path) -> None:
    with Server(model_dir, loads_model=False) as server:
        response = server.get("/health")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "model_loading")
        assert server.chat().json()["error"]["code"] == "model_loading"


@pytest.mark.parametrize("names", [5, None, [5], {"a": 1}])
def test_odd_names_in_a_configuration_are_shown_or_left_out(tmp_path: Path, names: object) -> None:
    directory = write_model(tmp_path)
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), "architectures": names, "text_config": 5, "model_type": [1]}
    path.write_text(json.dumps(config))
    files = ModelFiles.load(str(directory), sampling_defaults="none")
    assert files.architectures == (("5",) if isinstance(names, list) else ())
    assert (files.model_type, files.vocab_size) == ("[1]", config["vocab_size"])
    path.write_text(json.dumps({**config, "text_config": {"vocab_size": "many"}}))
    with pytest.raises(ConfigError, match="^config.json: vocab_size must be an integer"):
        ModelFiles.load(str(directory), sampling_defaults="none")
