"""Checkpoints in few bits behind the real server: the tokens of `LLM`, and one line for what is broken."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from engine import LLM, SamplingParams
from engine.errors import ConfigError
from helpers.gguf_files import write_gguf
from helpers.quantized_checkpoints import write_quantized
from helpers.server_process import ServerProcess, run
from helpers.tiny_models import VOCAB_SIZE, make_model
from helpers.tokenizers import byte_level_tokenizer, save_tokenizer

KINDS = ("awq", "gptq", "pack-quantized", "int-quantized", "gguf")
PROMPTS = ["def add(a, b):", "x", "one two three " * 9]


def write(kind: str, directory: Path) -> Path:
    tokenizer = byte_level_tokenizer(VOCAB_SIZE - 8)
    if kind == "gguf":
        model = make_model("llama", hidden_size=256, intermediate_size=512)
        kinds = {"attn_v": "Q6_K", "token_embd": "Q8_0", "ffn_up": "Q4_0"}

        def kind_of(name: str) -> str:
            return kinds.get(name.split(".")[-2], "Q4_K")

        return write_gguf(directory / "model.gguf", model, kind_of, tokenizer=tokenizer)
    write_quantized(directory, kind, order=kind == "gptq")
    save_tokenizer(tokenizer, directory)
    return directory


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Iterator[Path]:
    """One to be broken."""
    if checkpoint.is_dir():
        yield Path(shutil.copytree(checkpoint, tmp_path / "model"))
    else:
        yield Path(shutil.copy(checkpoint, tmp_path))


def test_the_server_answers_as_a_script_does(checkpoint: Path) -> None:
    with LLM(str(checkpoint), num_threads=2) as llm:
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        expected = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)]
    assert len({tuple(ids) for ids in expected}) > 1
    with ServerProcess("--model-path", str(checkpoint), "--num-threads", "2") as server:
        server.wait_ready()
        body = {"sampling_params": {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}}
        answers = server.http.post("/generate", json={"text": PROMPTS, **body}).json()
        assert [answer["output_ids"] for answer in answers] == expected
        completion = server.sdk().completions.create(
            model="default", prompt=PROMPTS[0], max_tokens=12, temperature=0, extra_body={"ignore_eos": True}
        )
        assert completion.usage and completion.usage.completion_tokens == 12
        assert server.stop() == 0
        assert "Traceback" not in server.log


def weights_of(checkpoint: Path) -> Path:
    return checkpoint / "model.safetensors" if checkpoint.is_dir() else checkpoint


def truncate(checkpoint: Path) -> None:
    path = weights_of(checkpoint)
    path.write_bytes(path.read_bytes()[:-100])


def cut_in_the_header(checkpoint: Path) -> None:
    path = weights_of(checkpoint)
    path.write_bytes(path.read_bytes()[:60])


def overwrite_the_header(checkpoint: Path) -> None:
    with weights_of(checkpoint).open("r+b") as file:
        file.write(b"\xff" * 64)


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)


def pickle_instead(checkpoint: Path) -> None:
    """A pickle by the name of the weights, and one that would run something."""
    path = weights_of(checkpoint)
    torch.save({"weight": torch.ones(2)}, path)
    path.write_bytes(path.read_bytes() + pickle.dumps(Evil()))


def leave_only_a_pickle(checkpoint: Path) -> None:
    path = weights_of(checkpoint)
    path.unlink()
    path = checkpoint / "pytorch_model.bin" if checkpoint.is_dir() else checkpoint
    path.write_bytes(pickle.dumps(Evil()))


def label_otherwise(checkpoint: Path) -> None:
    """The label of another way of storing."""
    if not checkpoint.is_dir():
        data = checkpoint.read_bytes()
        checkpoint.write_bytes(data.replace(b"llama", b"phi3\0", 1))
        return
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    is_awq = config["quantization_config"]["quant_method"] == "awq"
    group = {"bits": 4, "group_size": 32, "desc_act": False, "sym": False}
    config["quantization_config"] = {**group, "quant_method": "gptq" if is_awq else "awq"}
    path.write_text(json.dumps(config))


DAMAGES = (
    truncate,
    cut_in_the_header,
    overwrite_the_header,
    pickle_instead,
    leave_only_a_pickle,
    label_otherwise,
)


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_broken_is_one_line(copy: Path, damage: Callable[[Path], None]) -> None:
    damage(copy)
    with pytest.raises(ConfigError) as caught:
        LLM(str(copy))
    message = caught.value.message
    assert "\n" not in message and 20 < len(message) < 400, message


def test_the_server_says_so_and_ends(copy: Path) -> None:
    truncate(copy)
    ended = run("--model-path", str(copy), "--port", "0")
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert f"{weights_of(copy).name}" in ended.stderr and "truncated" in ended.stderr
