"""A real server on a model that only transformers knows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers.server_process import ServerProcess, run
from helpers.tiny_models import VOCAB_SIZE, make_model, save_model
from helpers.tokenizers import byte_level_tokenizer, save_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_model(make_model("stablelm"), tmp_path_factory.mktemp("stablelm"))
    save_tokenizer(byte_level_tokenizer(VOCAB_SIZE - 8), directory)
    return directory


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[ServerProcess]:
    with ServerProcess("--model-path", str(directory), "--pooling", "mean") as process:
        process.wait_ready()
        yield process
        assert process.stop() == 0
        assert "Traceback" not in process.log


def test_what_it_says_of_itself(server: ServerProcess) -> None:
    assert "StableLmForCausalLM runs through transformers" in server.log
    assert "batch_invariant true" in server.log
    info = server.http.get("/get_model_info").json()
    assert (info["implementation"], info["batch_invariant"]) == ("transformers", True)


def test_answers_do_not_depend_on_the_cache_or_the_way(server: ServerProcess) -> None:
    body = {
        "model": "default",
        "prompt": "def add(a, b): " * 10,
        "max_tokens": 24,
        "temperature": 0,
        "logprobs": 2,
    }
    first, second = (server.http.post("/v1/completions", json=body).json() for _ in range(2))
    assert first["choices"] == second["choices"]
    assert first["choices"][0]["logprobs"]["tokens"]
    metrics = server.http.get("/server_info").json()
    assert metrics["batch_invariant"] is True


def test_it_takes_no_adapters_and_says_so(server: ServerProcess, directory: Path) -> None:
    info = server.http.get("/get_model_info").json()
    assert info["lora"]["enabled"] is info["embedding"]["takes_adapters"] is False
    for path, body in (
        ("/v1/completions", {"model": "default", "prompt": "x", "lora_path": "pirate"}),
        ("/v1/embeddings", {"model": "default", "input": "x", "lora_path": "pirate"}),
        ("/load_lora_adapter", {"lora_name": "pirate", "lora_path": "pirate"}),
    ):
        response = server.http.post(path, json=body)
        assert (response.status_code, response.json()["param"]) == (400, "lora_path"), response.text
        assert "takes no adapters" in response.json()["message"]
    ended = run("--model-path", str(directory), "--port", "0", "--lora-paths", f"x={directory}")
    assert ended.returncode == 1 and "takes no adapters, as it runs through transformers" in ended.stderr


def test_it_embeds(server: ServerProcess) -> None:
    answer = server.http.post("/v1/embeddings", json={"model": "default", "input": ["a", "b c"]})
    assert [len(item["embedding"]) for item in answer.json()["data"]] == [128, 128]


def test_where_a_batch_may_change_bits_it_says_so(tmp_path: Path) -> None:
    """At start and whoever asks; the gate of Qwen2-MoE's shared expert is code of torch's own."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=32, shared_expert_intermediate_size=32,
    )  # fmt: skip
    save_model(transformers.Qwen2MoeForCausalLM(config), tmp_path)
    save_tokenizer(byte_level_tokenizer(VOCAB_SIZE - 8), tmp_path)
    with ServerProcess("--model-path", str(tmp_path)) as process:
        process.wait_ready()
        assert "batch_invariant false: " in process.log
        for path in ("/get_model_info", "/server_info"):
            assert process.http.get(path).json()["batch_invariant"] is False
        assert process.stop() == 0


def test_a_kind_that_cannot_be_served_ends_the_start(tmp_path: Path) -> None:
    import transformers

    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1)
    config.architectures = ["MambaForCausalLM"]
    config.save_pretrained(tmp_path)
    save_tokenizer(byte_level_tokenizer(64), tmp_path)
    ended = run("--model-path", str(tmp_path), "--port", "0")
    assert ended.returncode != 0 and "keeps a state from token to token" in ended.stderr
    assert "Traceback" not in ended.stderr
