"""Models that run through transformers: what is learnt before there are weights, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from engine.config.engine_config import EngineConfig
from engine.core.resolve import resolve
from engine.errors import CheckpointError, ConfigError
from engine.models.any_model import read_any_spec
from engine.models.fallback import skeleton
from engine.models.fallback.packed_weight import UnknownUse, packed
from engine.models.fallback.spec import AttentionLayer
from engine.ops import native
from engine.runner.model_runner import ModelRunner
from helpers.native import context
from helpers.tiny_models import WINDOW, make_model, save_model
from parity.driving import generate, make_runner

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


def write_config(directory: Path, family: str, **changes: Any) -> Path:
    import transformers

    ending = changes.pop("ending", "ForCausalLM")
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    config.architectures = [family + ending]
    config.save_pretrained(directory)
    return directory


def refusal(directory: Path, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read_any_spec(directory, **options)
    assert "\n" not in caught.value.message
    return caught.value.message


def edit_config(directory: Path, **changes: Any) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


def test_a_dry_run_tells_layers_heads_sizes_and_windows(tmp_path: Path) -> None:
    spec = read_any_spec(save_model(make_model("cohere2"), tmp_path / "a"))
    assert (spec.architecture, spec.vocab_size, spec.hidden_size) == ("Cohere2ForCausalLM", 512, 128)
    windows = [(index, layer.window) for index, layer in spec.layers]
    assert windows == [(0, WINDOW), (1, 0), (2, WINDOW)]
    spec = read_any_spec(save_model(make_model("deepseek_v3"), tmp_path / "b"))
    assert spec.layers[0] == (0, AttentionLayer(num_kv_heads=4, key_dim=48, value_dim=32, window=0))
    assert (spec.num_layers, spec.num_kv_heads, spec.head_dim) == (3, 4, 48)


def test_a_dry_run_tells_what_written_out_attention_keeps(tmp_path: Path) -> None:
    spec = read_any_spec(save_model(make_model("gpt_neo"), tmp_path / "a"))
    assert [(index, layer.window) for index, layer in spec.layers] == [(0, 0), (1, WINDOW), (2, 0)]
    assert not spec.has_position_bias
    spec = read_any_spec(save_model(make_model("falcon"), tmp_path / "b"))
    assert (spec.num_kv_heads, spec.head_dim, spec.layers[0][1].key_dim) == (1, 32, 32)
    spec = read_any_spec(save_model(make_model("bloom"), tmp_path / "c"))
    assert spec.has_position_bias and spec.max_position_embeddings == 1024
    assert (spec.num_kv_heads, spec.head_dim) == (6, 32)  # 16 numbers and 3 for the bias
    config = EngineConfig(model_path=str(tmp_path / "c"), kv_cache_dtype="int8")
    with pytest.raises(ConfigError, match="--kv-cache-dtype int8 is not supported for BloomForCausalLM"):
        resolve(config, spec)


def test_biases_of_positions_without_a_context(tmp_path: Path) -> None:
    directory = write_config(tmp_path, "Bloom")
    config = json.loads((directory / "config.json").read_text())
    del config["max_position_embeddings"]
    (directory / "config.json").write_text(json.dumps(config))
    assert read_any_spec(directory).max_position_embeddings == 2048


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("Mamba", {}, "keeps a state from token to token"),
        ("Jamba", {"num_experts": 2}, "keeps a state from token to token"),
        ("T5", {"ending": "ForConditionalGeneration"}, "encoder-decoder models are not supported"),
        (
            "OpenAIGPT",
            {"ending": "LMHeadModel"},
            "attention of OpenAIGPTLMHeadModel neither goes through transformers' registry nor is written "
            "out over a cache of keys and values",
        ),
        (
            "StableLm",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "dynamic",
        ),
        (
            "ViT",
            {"ending": "ForImageClassification"},
            "unsupported architecture: ViTForImageClassification; ",
        ),
    ],
)
def test_kinds_that_are_refused(tmp_path: Path, family: str, changes: dict, message: str) -> None:
    assert message in refusal(write_config(tmp_path, family, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "checkpoints quantised by 'fp8' are not supported",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, "awq with None bits is not supported"),
        ({"model_type": "made_up"}, "unsupported architecture: StableLmForCausalLM; neither"),
        ({"model_type": ["a"]}, "unsupported architecture: StableLmForCausalLM; neither"),
        ({"hidden_size": "many"}, "transformers cannot build this model"),
        ({"num_attention_heads": 3}, "transformers cannot build this model"),
        ({"max_position_embeddings": -1}, "max_position_embeddings"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be an integer from 0 to 4096"),
        ({"text_config": {"num_experts": 10**9}}, "num_experts must be an integer from 0 to 4096"),
        ({"max_position_embeddings": 2**24 + 1}, "max_position_embeddings must be from 1 to 16777216"),
        ({"dtype": "int8"}, "checkpoint dtype 'int8' is not supported"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    assert message in refusal(edit_config(write_config(tmp_path, "StableLm"), **changes))


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        ("stablelm", "intermediate_size"),
        ("stablelm", "hidden_size"),
        ("deepseek_v3", "moe_intermediate_size"),
        ("deepseek_v3", "q_lora_rank"),
        ("olmoe", "intermediate_size"),
    ],
)
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_size_of_nothing_is_named(tmp_path: Path, kind: str, field: str, load_format: str) -> None:
    directory = edit_config(save_model(make_model(kind), tmp_path), **{field: 0})
    with pytest.raises(ConfigError) as caught:
        make_runner(directory, load_format=load_format)
    named = r"(config.json: \S+ would have shape \[.*\]|transformers cannot build this model: .*); fields of"
    assert re.match(named + rf" config.json that are 0: .*{field}", caught.value.message)
    assert "\n" not in caught.value.message


def test_a_configuration_that_its_own_modules_cannot_follow(tmp_path: Path) -> None:
    """Latent attention has no heads to share: where config.json speaks of fewer, the first product fails."""
    directory = edit_config(save_model(make_model("deepseek_v3"), tmp_path), num_key_value_heads=2)
    with pytest.raises(ConfigError, match="^DeepseekV3ForCausalLM cannot compute with this configuration: "):
        make_runner(directory)


def test_code_of_a_checkpoint_runs_only_where_it_is_trusted(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    write_config(tmp_path, "StableLm")
    (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nraise ValueError('it ran')\n")
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit_config(tmp_path, auto_map=auto_map, architectures=["Evil"], model_type="evil")
    assert "--trust-remote-code" in refusal(tmp_path)
    assert not mark.exists()
    assert "it ran" in refusal(tmp_path, trusts_remote_code=True)
    assert mark.exists()


def test_a_known_type_never_runs_code_of_the_checkpoint(tmp_path: Path) -> None:
    write_config(tmp_path, "StableLm")
    (tmp_path / "evil.py").write_text("raise ValueError('it ran')\n")
    edit_config(tmp_path, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    assert read_any_spec(tmp_path).architecture == "StableLmForCausalLM"


def test_attention_that_config_names_is_not_fetched(tmp_path: Path) -> None:
    """Names with a slash are code on the hub to transformers."""
    for key in ("attn_implementation", "_attn_implementation"):
        directory = edit_config(write_config(tmp_path / key, "Bloom"), **{key: "somebody/kernel"})
        assert read_any_spec(directory).architecture == "BloomForCausalLM"


def test_a_gate_of_one_number_a_token_is_told(tmp_path: Path) -> None:
    """Its sigmoid has other bits at the end of a row of tokens: torch's own code, which we do not replace."""
    changes = {"num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(**{**SIZES, **changes})
    save_model(transformers.Qwen2MoeForCausalLM(config), tmp_path)
    verdict = make_runner(tmp_path).verdict
    assert not verdict.is_batch_invariant and verdict.reason


def test_a_layer_that_remembers_otherwise_is_refused(tmp_path: Path, monkeypatch) -> None:
    """Lfm2's convolutions look back without keys and values."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])
    save_model(transformers.Lfm2ForCausalLM(config), tmp_path)
    assert "layers of kind conv keep more than keys and values" in refusal(tmp_path)
    monkeypatch.setattr(skeleton, "LAYER_TYPES", ("full_attention", "conv"))  # the check at start knows, too
    with pytest.raises(ConfigError, match="keeps more than keys and values from token to token"):
        make_runner(tmp_path)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantized_weights_stay_close(tmp_path: Path, quantization: str) -> None:
    save_model(make_model("olmoe"), tmp_path)
    prompt = list(range(3, 60))
    exact = generate(make_runner(tmp_path), prompt, 1)[1]
    rounded = generate(make_runner(tmp_path, quantization=quantization), prompt, 1)[1]
    assert torch.corrcoef(torch.cat([exact, rounded]))[0, 1] > (0.98 if quantization == "int8" else 0.7)
    assert not torch.equal(exact, rounded)


def test_it_takes_no_adapters(tmp_path: Path) -> None:
    runner = make_runner(write_config(tmp_path, "StableLm"), load_format="dummy")
    assert runner.adapter_reader is None


def test_packed_weights_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(make_model("stablelm"), tmp_path / "model")
    cache = str(tmp_path / "cache")
    prompt = list(range(3, 40))
    first = generate(make_runner(tmp_path / "model", packed_cache=cache), prompt, 4)
    monkeypatch.setattr(ModelRunner, "_load", None)  # the checkpoint is not read
    again = generate(make_runner(tmp_path / "model", packed_cache=cache), prompt, 4)
    assert first[0] == again[0] and torch.equal(first[1], again[1])


def test_invented_weights(tmp_path: Path) -> None:
    runner = make_runner(write_config(tmp_path, "StableLm"), load_format="dummy")
    assert torch.isfinite(generate(runner, [3, 4, 5], 2)[1]).all()


# --- broken checkpoints, by either way of loading


@pytest.fixture(params=["stablelm", "olmoe"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_model(make_model(request.param), tmp_path)


def broken(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        make_runner(directory)
    assert "\n" not in caught.value.message
    return caught.value.message


def test_a_pickle_is_never_loaded(saved: Path) -> None:
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    assert "pytorch_model.bin is a pickle, which is never loaded" in broken(saved)


@pytest.mark.parametrize("file", ["other.safetensors.index.json", "adapter_model.bin"])
def test_files_besides_the_usual_ones_are_not_loaded(tmp_path: Path, file: str) -> None:
    """Transformers would follow the list of another index, and load the pickle of an adapter."""
    directory = save_model(make_model("olmoe"), tmp_path)
    if file.endswith(".bin"):
        (directory / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    else:
        edit_config(directory, transformers_weights=file)
    assert "adapter_config.json and transformers_weights are not supported" in broken(directory)


def test_a_truncated_file(saved: Path) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors is broken or truncated" in broken(saved)


def test_tensors_too_few_too_many_or_of_another_shape(saved: Path) -> None:
    path = saved / "model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(path).items()}  # the file is written anew
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, path, metadata={"format": "pt"})
    assert name in broken(saved)
    save_file({**tensors, "model.extra.weight": tensors[name].clone()}, path, metadata={"format": "pt"})
    assert "model.extra.weight" in broken(saved)
    save_file({**tensors, name: tensors[name][:-1].clone()}, path, metadata={"format": "pt"})
    assert name in broken(saved) or "size" in broken(saved)
    save_file({**tensors, name: tensors[name].to(torch.int8)}, path, metadata={"format": "pt"})
    assert name in broken(saved)


# --- weights that only know how they are multiplied


def test_products_of_a_stand_in() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix, x = torch.randn(48, 32, generator=generator), torch.randn(2, 5, 32, generator=generator)
    bias = torch.randn(48, generator=generator)
    weight = packed("w.weight", matrix.shape, is_exact=False)
    assert torch.equal(F.linear(x, weight, bias), torch.zeros(2, 5, 48))  # there is nothing in it yet
    weight.allocate(native, context("auto"), "float32", "float32")
    weight.store(matrix)
    assert torch.allclose(F.linear(x, weight, bias), F.linear(x, matrix, bias), atol=1e-4)
    assert torch.allclose(F.linear(x.double(), weight.to(torch.float64)), F.linear(x, matrix), atol=1e-4)
    assert torch.equal(F.embedding(torch.tensor([[3, 0]]), weight), matrix[torch.tensor([[3, 0]])])
    assert torch.allclose(x @ weight.T, F.linear(x, matrix), atol=1e-4)
    for use in (
        lambda: weight.T + 1,
        lambda: weight + 1,
        lambda: x @ weight,
        lambda: torch.softmax(weight, 0),
    ):
        with pytest.raises(UnknownUse, match=r"w\.weight"):
            use()


def test_products_from_the_other_side_and_of_experts() -> None:
    generator = torch.Generator().manual_seed(0)
    matrices, x = torch.randn(3, 32, 48, generator=generator), torch.randn(5, 32, generator=generator)
    stack = packed("experts.up", matrices.shape, is_exact=False)
    assert (x @ stack[torch.tensor(1)]).shape == (5, 48)
    stack.allocate(native, context("auto"), "float32", "float32")
    dict(stack.slots())["experts.up"].store(matrices)
    for expert in range(3):
        assert torch.allclose(x @ stack[expert], x @ matrices[expert], atol=1e-4)
    with pytest.raises(UnknownUse, match="experts.up"):
        stack[torch.tensor([0, 1])]
