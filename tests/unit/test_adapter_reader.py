"""What adapters are refused, and with which words; files are made by hand."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.adapters.lora import AdapterReader
from engine.adapters.peft_config import PeftConfig
from engine.errors import InvalidRequest
from engine.models.lora_sites import Site
from engine.ops import reference

V, E, INNER = 50, 32, 48
ATTENTION, MLP = "model.layers.{}.self_attn.", "model.layers.{}.mlp."
PREFIX = "base_model.model."


def sites() -> list[Site]:
    found = [Site.of(V, [("model.embed_tokens", E)])]
    for layer in range(2):
        attention, mlp = ATTENTION.format(layer), MLP.format(layer)
        found += [
            Site.of(E, [(f"{attention}q_proj", E), (f"{attention}k_proj", 16), (f"{attention}v_proj", 16)]),
            Site.of(E, [(f"{attention}o_proj", E)]),
            Site.of(E, [(f"{mlp}gate_proj", INNER), (f"{mlp}up_proj", INNER)]),
            Site.of(INNER, [(f"{mlp}down_proj", E)]),
        ]
    return [*found, Site.of(E, [("lm_head", V)])]


def config(**changes: Any) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "down_proj"],
        **changes,
    }


def tensors(rank: int = 4) -> dict[str, torch.Tensor]:
    """Of the adapter that `config()` describes."""
    made = {}
    for layer in range(2):
        for name, k, n in ((f"{ATTENTION}q_proj", E, E), (f"{MLP}down_proj", INNER, E)):
            made[f"{PREFIX}{name.format(layer)}.lora_A.weight"] = torch.randn(rank, k)
            made[f"{PREFIX}{name.format(layer)}.lora_B.weight"] = torch.randn(n, rank)
    return made


def write(directory: Path, fields: Any = None, weights: dict[str, torch.Tensor] | None = None) -> Path:
    directory.mkdir(exist_ok=True)
    content = fields if isinstance(fields, str) else json.dumps(config() if fields is None else fields)
    (directory / "adapter_config.json").write_text(content)
    save_file(tensors() if weights is None else weights, directory / "adapter_model.safetensors")
    return directory


@pytest.fixture
def base(tmp_path: Path) -> Path:
    directory = tmp_path / "base"
    directory.mkdir()
    save_file(
        {"model.embed_tokens.weight": torch.arange(V * E).view(V, E).float()}, directory / "model.safetensors"
    )
    return directory


@pytest.fixture
def reader(base: Path) -> AdapterReader:
    return AdapterReader(sites(), base, dtype="float32", max_rank=64, ops=reference)


def refusal(reader: AdapterReader, directory: Path) -> str:
    with pytest.raises(InvalidRequest) as caught:
        reader.load(directory)
    with pytest.raises(InvalidRequest) as checked:
        reader.check(directory)
    assert checked.value.message == caught.value.message
    assert caught.value.slug == "invalid_adapter" and "\n" not in caught.value.message
    return caught.value.message


def test_reads_what_is_right(reader, tmp_path):
    loaded = reader.load(write(tmp_path / "a"))
    assert loaded.rank == 4 and loaded.weights.sites[1] == (E, False, [(0, E, 4, 2.0)])
    assert [len(modules) for _, _, modules in loaded.weights.sites] == [0, 1, 0, 0, 1, 1, 0, 0, 1, 0]


def test_a_check_packs_nothing(base, tmp_path, monkeypatch):
    reader = AdapterReader(sites(), base, dtype="float32", max_rank=64, ops=reference)
    loaded = reader.load(write(tmp_path / "a"))
    monkeypatch.delattr(reference, "LoraAdapter")
    checked = reader.check(tmp_path / "a")
    assert (checked.digest, checked.rank) == (loaded.digest, loaded.rank)
    assert not hasattr(checked, "weights")


def headless(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As peft names the tensors of an adapter for the model without its head."""
    return {name.replace(f"{PREFIX}model.", PREFIX): tensor for name, tensor in weights.items()}


def test_an_adapter_of_the_model_without_its_head(reader, base, tmp_path):
    for number, targets in enumerate((["q_proj", "down_proj"], r"layers\..\.(mlp\.down|self_attn\.q)_proj")):
        loaded = reader.load(
            write(tmp_path / f"{number}", config(target_modules=targets), headless(tensors()))
        )
        assert loaded.weights.sites == reader.load(write(tmp_path / "whole")).weights.sites
    both = tensors() | headless(tensors())
    assert "does not" in refusal(reader, write(tmp_path / "both", weights=both))
    some = headless(tensors())
    some.pop(max(some))
    assert "lacks base_model.model.layers.1" in refusal(reader, write(tmp_path / "some", weights=some))
    head = {
        f"{PREFIX}lm_head.lora_A.weight": torch.ones(4, E),
        f"{PREFIX}lm_head.lora_B.weight": torch.ones(V, 4),
    }
    fields = config(target_modules=["q_proj", "down_proj", "lm_head"])
    assert "lm_head" in refusal(reader, write(tmp_path / "head", fields, headless(tensors()) | head))
    copy = {f"{PREFIX}embed_tokens.weight": torch.arange(V * E).view(V, E).float()}
    assert reader.load(write(tmp_path / "copy", weights=headless(tensors()) | copy)).rank == 4
    copy = {f"{PREFIX}embed_tokens.weight": torch.ones(V, E)}
    assert "added or changed" in refusal(reader, write(tmp_path / "copy", weights=headless(tensors()) | copy))


def test_the_digest_is_of_the_contents(reader, tmp_path):
    weights = tensors()
    first = reader.load(write(tmp_path / "a", weights=weights)).digest
    assert reader.load(write(tmp_path / "b", weights=weights)).digest == first
    assert reader.load(write(tmp_path / "a", config(lora_alpha=9), weights)).digest != first
    changed = {name: tensor + (name == min(weights)) for name, tensor in weights.items()}
    assert reader.load(write(tmp_path / "a", weights=changed)).digest != first


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
        ({"use_something_new": True}, "use_something_new"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"r": 0}, "r must be"),
        ({"r": "8"}, "r must be"),
        ({"r": True}, "r must be"),
        ({"r": 65}, "--max-lora-rank is 64"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": 1e40}, "lora_alpha"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": ["nothing"]}, "no module"),
        ({"target_modules": "(a+)+$"}, "too complicated"),
        ({"target_modules": "x" * 600}, "too complicated"),
        ({"target_modules": "(unclosed"}, "is wrong"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern"),
        ({"rank_pattern": []} | {"rank_pattern": [1]}, "rank_pattern"),
        ({"alpha_pattern": {"((((((((((": 1}}, "too complicated"),
        ({"layers_to_transform": ["x"]}, "layers_to_transform"),
        ({"layers_to_transform": [0], "layers_pattern": "blocks"}, "layers_pattern"),
    ],
)
def test_configurations_that_are_refused(reader, tmp_path, changes, word):
    assert word in refusal(reader, write(tmp_path / "a", config(**changes)))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 5000, '{"r": NaN'])
def test_broken_configurations(reader, tmp_path, text):
    directory = write(tmp_path / "a")
    (directory / "adapter_config.json").write_text(text)
    assert "adapter_config.json" in refusal(reader, directory)


def test_a_hostile_pattern_takes_no_time():
    """Twice the patterns that hang a backtracking matcher on names like these."""
    name = "model.layers.0.self_attn.q_proj"
    for pattern in (r"(\w|\.)*x", r"(a|a)*b", r"(.*)*$x", r"(?:.+){20}x"):
        with pytest.raises(InvalidRequest, match="complicated"):
            PeftConfig.parse(json.dumps(config(target_modules=pattern)).encode())
    slow = PeftConfig.parse(json.dumps(config(target_modules=r".*.*.*.*x")).encode())
    assert not slow.is_targeted(name * 4)


def test_many_hostile_patterns_take_no_time():
    slow = {f".*.*.*.*x{number}": 4 for number in range(8)}
    with pytest.raises(InvalidRequest, match="together have more than 32 repeats"):
        PeftConfig.parse(json.dumps(config(rank_pattern={**slow, ".*x": 4})).encode())
    with pytest.raises(InvalidRequest, match="at most 1024 patterns"):
        PeftConfig.parse(json.dumps(config(rank_pattern=dict.fromkeys(map(str, range(1025)), 4))).encode())
    most = {**slow, **{f"model.layers.{number}.mlp.up_proj": 2 for number in range(1000)}}
    parsed = PeftConfig.parse(json.dumps(config(rank_pattern=most, alpha_pattern=most)).encode())
    began_s = time.process_time()
    for layer in range(24):
        for name in ("self_attn.q_proj", "mlp.up_proj"):
            module = f"model.layers.{layer}.{name}"
            assert parsed.rank_of(module) == (2 if name == "mlp.up_proj" else config()["r"])
            parsed.scale_of(module)
    assert time.process_time() - began_s < 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(min(t)), ["lacks", "lora_A"]),
        (
            lambda t: t.update({f"{PREFIX}model.layers.7.mlp.up_proj.lora_A.weight": torch.zeros(4, 4)}),
            ["layers.7"],
        ),
        (lambda t: t.update(extra=torch.zeros(1)), ["extra"]),
        (lambda t: t.update({min(t): torch.zeros(4, 33)}), ["[4, 33]", "[4, 48]"]),
        (lambda t: t.update({min(t): torch.zeros(5, INNER)}), ["[5, 48]"]),
        (lambda t: t.update({min(t): torch.zeros(4, INNER, dtype=torch.int8)}), ["I8"]),
        (lambda t: t.update({f"{PREFIX}x.lora_magnitude_vector.weight": torch.zeros(1)}), ["DoRA"]),
        (
            lambda t: t.update({f"{PREFIX}model.embed_tokens.weight": torch.zeros(V + 2, E)}),
            ["added or changed"],
        ),
        (lambda t: t.update({f"{PREFIX}lm_head.weight": torch.ones(V, E)}), ["added or changed"]),
        (lambda t: t.clear(), ["lacks"]),
    ],
)
def test_tensors_that_do_not_fit(reader, tmp_path, change, words):
    weights = tensors()
    change(weights)
    message = refusal(reader, write(tmp_path / "a", weights=weights))
    assert all(word in message for word in words), message


def test_an_unchanged_copy_of_the_base_is_no_matter(reader, tmp_path):
    copy = torch.arange(V * E).view(V, E).float()
    names = (f"{PREFIX}model.embed_tokens.weight", f"{PREFIX}lm_head.base_layer.weight")
    weights = tensors() | dict.fromkeys(names[:1], copy) | {names[1]: copy.clone()}
    assert reader.load(write(tmp_path / "a", weights=weights)).rank == 4


@pytest.mark.parametrize("size", [0, 4, 8, 100, 5000])
def test_truncated_weights(reader, tmp_path, size):
    path = write(tmp_path / "a") / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert "adapter_model.safetensors" in refusal(reader, tmp_path / "a")


def test_a_header_that_lies_is_refused(reader, tmp_path):
    path = write(tmp_path / "a") / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes((2**60).to_bytes(8, "little") + data[8:])
    assert "broken" in refusal(reader, tmp_path / "a")


def test_pickles_pipes_and_directories(reader, tmp_path):
    directory = write(tmp_path / "a")
    weights = directory / "adapter_model.safetensors"
    weights.rename(directory / "adapter_model.bin")
    assert "pickled" in refusal(reader, directory)
    os.mkfifo(weights)
    assert "no regular file" in refusal(reader, directory)
    weights.unlink()
    weights.mkdir()
    assert "no regular file" in refusal(reader, directory)
    weights.rmdir()
    weights.symlink_to("/dev/zero")
    assert "no regular file" in refusal(reader, directory)
    (directory / "adapter_config.json").unlink()
    os.mkfifo(directory / "adapter_config.json")
    assert "no regular file" in refusal(reader, directory)
    assert "adapter_config.json" in refusal(reader, tmp_path / "nothing")


def test_a_huge_configuration(reader, tmp_path):
    write(tmp_path / "a", json.dumps(config(x="y" * (1 << 20))))
    assert "bytes" in refusal(reader, tmp_path / "a")
