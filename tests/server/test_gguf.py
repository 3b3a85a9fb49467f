"""`python -m engine.server --model-path FILE.gguf` answers as the checkpoint that the file was made from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
import torch

from engine.config.model_location import bundled_model
from engine.text.tokenizer import Tokenizer
from helpers.gguf_files import write_gguf
from helpers.server_process import ServerProcess, run
from helpers.tiny_models import load_model

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model as bf16.gguf and q8_0.gguf."""
    directory = tmp_path_factory.mktemp("gguf")
    template = Tokenizer.from_directory(bundled_model()).chat_templates["default"]
    for kind in ("BF16", "Q8_0"):
        write_gguf(
            directory / f"{kind.lower()}.gguf",
            load_model(bundled_model(), torch.float32),
            lambda name, kind=kind: kind,
            tokenizer=tokenizers.Tokenizer.from_file(str(bundled_model() / "tokenizer.json")),
            pre="smollm",
            metadata={"tokenizer.chat_template": template},
        )
    return directory


def ask(server: ServerProcess) -> str:
    server.wait_ready()
    answer = server.sdk().chat.completions.create(
        model="m", messages=QUESTION, temperature=0, max_tokens=30, logprobs=True
    )
    assert answer.choices[0].finish_reason == "stop"
    return json.dumps([[t.token, t.logprob] for t in answer.choices[0].logprobs.content])


def test_the_file_answers_as_the_checkpoint(files):
    """In bfloat16 bit for bit, log-probabilities included."""
    flags = ("--num-threads", "2", "--served-model-name", "m")
    with ServerProcess("--model-path", str(files / "bf16.gguf"), *flags) as server:
        ours = ask(server)
        assert server.stop() == 0
    with ServerProcess(*flags) as server:
        assert ask(server) == ours
        assert server.stop() == 0


def test_8_bits_answer_too_and_say_what_they_are(files):
    path = files / "q8_0.gguf"
    with ServerProcess("--model-path", str(path), "--num-threads", "2") as server:
        server.wait_ready()
        sdk = server.sdk()
        (model,) = sdk.models.list().data
        answer = sdk.chat.completions.create(model=model.id, messages=QUESTION, temperature=0, max_tokens=30)
        assert "Paris" in answer.choices[0].message.content
        assert answer.choices[0].finish_reason == "stop"
        info = server.http.get("/get_model_info").json()
        assert info["architectures"] == ["LlamaForCausalLM"] and info["model_path"] == str(path)
        ids = server.http.post("/tokenize", json={"prompt": "Hello 12"}).json()["tokens"]
        assert ids == Tokenizer.from_directory(bundled_model()).encode("Hello 12")
        assert server.stop() == 0
        assert "Traceback" not in server.log


def test_a_broken_file_is_one_line(files, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes((files / "q8_0.gguf").read_bytes()[:100_000])
    ended = run("--model-path", str(broken), "--port", "0")
    assert ended.returncode != 0
    assert "broken.gguf: is broken or truncated" in ended.stderr or "is truncated" in ended.stderr
    assert "Traceback" not in ended.stderr
