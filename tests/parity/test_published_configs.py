"""What published config.json files say, each in the spelling of its time, is what is computed."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import CheckpointError
from engine.models.any_model import read_any_spec
from engine.models.checkpoint_files import SINGLE_FILE
from engine.models.encoder_registry import is_encoder, read_encoder_spec
from engine.models.quantized_config import read_quantization
from engine.models.spec import ModelSpec
from helpers.embedding_models import (
    NORMALIZE,
    embed,
    expected_vectors,
    load,
    pooling,
    random_texts,
    write_modules,
)
from helpers.published_configs import (
    DOCUMENTED_POOLING,
    EMBEDDERS,
    PUBLISHED,
    VOCAB_SIZE,
    shrunk,
    shrunk_encoder,
)
from helpers.quantized_checkpoints import write_quantized
from helpers.tiny_models import fill_at_random
from parity.driving import generate, make_runner

BILLIONS = {
    "Llama-2-7b": 6.74, "Llama-3.2-1B": 1.24, "deepseek-coder-6.7b": 6.74, "Mistral-7B-v0.1": 7.24,
    "Mistral-7B-v0.3": 7.25, "Mistral-Nemo-2407": 12.2, "Mistral-Small-3.1-24B": 23.6, "Qwen2.5-0.5B": 0.494,
    "Qwen2.5-7B, for long texts": 7.62, "Qwen3-0.6B": 0.596, "Qwen3-30B-A3B": 30.5, "gemma-2-2b": 2.61,
    "gemma-2-27b": 27.2, "gemma-3-1b-it": 1.0, "gemma-3-270m": 0.268, "gemma-3-4b-it": 3.88,
    "gemma-3-27b-it": 27.0, "Phi-3-mini-4k": 3.82, "Phi-3.5-mini": 3.82, "phi-4": 14.7, "Phi-4-mini": 3.84,
    "OLMo-2-1124-7B": 7.3,
    "granite-3.1-2b": 2.53, "SmolLM3-3B": 3.08, "Mixtral-8x7B-v0.1": 46.7, "gpt-oss-20b": 20.9,
}  # fmt: skip
"""As their model cards have them, of the part for text."""


def write(directory: Path, config: dict) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_is_read_by_a_model_of_ours(name: str, tmp_path: Path) -> None:
    spec = read_any_spec(write(tmp_path, PUBLISHED[name]))
    assert isinstance(spec, ModelSpec)
    assert abs(spec.num_parameters / 1e9 / BILLIONS[name] - 1) < 0.01


def random_prompt() -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCAB_SIZE, (90,), generator=generator).tolist()


def their_model(directory: Path):
    """What transformers makes of the same config.json, a model of its part for text."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory)
    config = getattr(config, "text_config", config)
    for name in ("quantization_config", "auto_map"):
        if hasattr(config, name):
            delattr(config, name)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    torch.manual_seed(0)
    return fill_at_random(model.eval(), type(model).__name__)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_small_model_of_it_is_transformers(name: str, tmp_path: Path) -> None:
    config = shrunk(copy.deepcopy(PUBLISHED[name]))
    config.pop("quantization_config", None)  # `test_mxfp4` has those
    model = their_model(write(tmp_path, config))
    model.save_pretrained(tmp_path)
    write(tmp_path, config)
    prompt = random_prompt()
    tokens, logits = generate(make_runner(tmp_path), prompt, 8)
    with torch.no_grad():
        theirs = model(torch.tensor([prompt + tokens[:-1]]), use_cache=False).logits[0, len(prompt) - 1 :]
    assert (logits - theirs).abs().max() <= 1e-4 * theirs.std()
    assert theirs.argmax(-1).tolist() == tokens


def test_longrope_by_its_first_name(tmp_path: Path) -> None:
    """Which transformers no longer reads."""
    config = PUBLISHED["Phi-3.5-mini"]
    spec = read_any_spec(write(tmp_path, config))
    su = {**config, "rope_scaling": {**config["rope_scaling"], "type": "su"}}
    assert read_any_spec(write(tmp_path, su)) == spec


W4A16 = {
    "actorder": "weight", "block_structure": None, "dynamic": False, "group_size": 128, "num_bits": 4,
    "observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": True, "type": "int",
}  # fmt: skip
W8A8 = W4A16 | {"actorder": None, "group_size": None, "num_bits": 8, "strategy": "channel"}
TOKENS_8 = {"dynamic": True, "num_bits": 8, "strategy": "token", "symmetric": True, "type": "int"}


def compressed(weights: dict, layout: str, **group: object) -> dict:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "output_activations": None, **group}}
    return {
        "config_groups": groups, "format": layout, "ignore": ["lm_head"], "kv_cache_scheme": None,
        "quant_method": "compressed-tensors", "quantization_status": "compressed",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (
            {"bits": 4, "group_size": 128, "modules_to_not_convert": None, "quant_method": "awq",
             "version": "gemm", "zero_point": True},
            ("awq", 4, 128, False, False),
        ),
        (
            {"bits": 4, "damp_percent": 0.1, "desc_act": False, "group_size": 128, "quant_method": "gptq",
             "model_file_base_name": "model", "model_name_or_path": None, "sym": True,
             "true_sequential": True},
            ("gptq", 4, 128, True, False),
        ),
        (
            {"bits": 4, "checkpoint_format": "gptq", "desc_act": True, "dynamic": None, "group_size": 32,
             "lm_head": False, "meta": {"quantizer": ["gptqmodel:2.0"]}, "pack_dtype": "int32",
             "quant_method": "gptq", "sym": True},
            ("gptq", 4, 32, True, True),
        ),
        (compressed(W4A16, "pack-quantized"), ("pack-quantized", 4, 128, True, False)),
        (
            compressed(W4A16 | {"actorder": "group"}, "pack-quantized", input_activations=None),
            ("pack-quantized", 4, 128, True, True),
        ),
        (
            compressed(W8A8, "int-quantized", input_activations=TOKENS_8),
            ("int-quantized", 8, 0, True, False),
        ),
    ],
)  # fmt: skip
def test_published_quantization_configs(facts: dict, expected: tuple) -> None:
    """Of Qwen's AWQ, TheBloke's and GPTQModel's GPTQ, and llm-compressor's files."""
    (found,) = read_quantization({"quantization_config": facts})
    facts_found = found.method, found.bits, found.group_size, found.is_symmetric, found.has_order
    assert facts_found == expected


OLD_NAMES = {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
NEW_NAMES = {"model.": "model.language_model."}


def rename(tensors: dict[str, torch.Tensor], prefixes: dict[str, str]) -> dict[str, torch.Tensor]:
    def theirs(name: str) -> str:
        ours = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        return prefixes.get(ours, "") + name.removeprefix(ours)

    return {theirs(name): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("prefixes", [OLD_NAMES, NEW_NAMES])
@pytest.mark.parametrize("name", ["gemma-3-4b-it", "Mistral-Small-3.1-24B"])
def test_what_sees_is_left_alone(name: str, prefixes: dict[str, str], tmp_path: Path) -> None:
    write(tmp_path, shrunk(copy.deepcopy(PUBLISHED[name])))
    config_json = (tmp_path / "config.json").read_text()
    their_model(tmp_path).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config_json)
    tokens, logits = generate(make_runner(tmp_path), random_prompt(), 4)
    tensors = rename(load_file(tmp_path / SINGLE_FILE), prefixes)
    seeing = {"vision_tower.a.weight": torch.ones(3), "multi_modal_projector.b.weight": torch.ones(3)}
    before = "model." if prefixes is NEW_NAMES else ""
    save_file(tensors | {before + key: tensor for key, tensor in seeing.items()}, tmp_path / SINGLE_FILE)
    again = generate(make_runner(tmp_path), random_prompt(), 4)
    assert again[0] == tokens and torch.equal(again[1], logits)

    save_file(tensors | {"model.audio_tower.weight": torch.ones(3)}, tmp_path / SINGLE_FILE)
    with pytest.raises(CheckpointError, match=r"does not: model\.audio_tower\.weight$"):
        make_runner(tmp_path)


def test_the_part_for_text_may_come_in_few_bits(tmp_path: Path) -> None:
    write_quantized(tmp_path, "pack-quantized", kind="mistral", symmetric=True)
    tokens, logits = generate(make_runner(tmp_path), random_prompt(), 4)
    text = json.loads((tmp_path / "config.json").read_text())
    whole = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3"}
    whole["quantization_config"] = text.pop("quantization_config")
    write(tmp_path, {**whole, "text_config": text})
    tensors = rename(load_file(tmp_path / SINGLE_FILE), OLD_NAMES)
    save_file(tensors | {"vision_tower.a.weight": torch.ones(3)}, tmp_path / SINGLE_FILE)
    runner = make_runner(tmp_path)
    assert runner.model.slots()["model.layers.0.self_attn.o_proj.weight"].matrix.dtype == "int4"
    again = generate(runner, random_prompt(), 4)
    assert again[0] == tokens and torch.equal(again[1], logits)


def test_other_parts_have_no_place_in_a_checkpoint_of_text(tmp_path: Path) -> None:
    write(tmp_path, config := shrunk(PUBLISHED["Llama-3.2-1B"]))
    their_model(tmp_path).save_pretrained(tmp_path)
    write(tmp_path, config)
    tensors = load_file(tmp_path / SINGLE_FILE)
    save_file(tensors | {"vision_tower.a.weight": torch.ones(3)}, tmp_path / SINGLE_FILE)
    with pytest.raises(CheckpointError, match=r"does not: vision_tower\.a\.weight$"):
        make_runner(tmp_path)


def test_a_dtype_that_config_does_not_name_is_that_of_most_weights(tmp_path: Path) -> None:
    """As gpt-oss is published: matrices bfloat16, codes of experts bytes; here a few numbers float32."""
    assert "torch_dtype" not in PUBLISHED["gpt-oss-20b"]
    config = shrunk(PUBLISHED["Qwen3-0.6B"])
    write(tmp_path, {key: value for key, value in config.items() if key != "torch_dtype"})
    assert read_any_spec(tmp_path).dtype == "float32"  # there is nothing to tell
    tensors = {"a": torch.zeros(50, 50).bfloat16(), "b": torch.zeros(9), "c": torch.zeros(9999).byte()}
    save_file(tensors, tmp_path / SINGLE_FILE)
    assert read_any_spec(tmp_path).dtype == "bfloat16"
    (tmp_path / SINGLE_FILE).write_bytes(b"no tensors")
    assert read_any_spec(tmp_path).dtype == "float32"  # and loading will say what is wrong


MILLIONS = {
    "bge-base-en-v1.5": 109, "all-distilroberta-v1": 82, "multilingual-e5-large": 560,
    "distilbert-base": 66, "gte-modernbert-base": 149, "Qwen3-Embedding-0.6B": 596, "e5-mistral-7b": 7111,
    "embeddinggemma-300m": 303,
}  # fmt: skip


@pytest.mark.parametrize("name", EMBEDDERS)
def test_a_model_that_embeds_is_read_and_a_small_one_is_transformers(name: str, tmp_path: Path) -> None:
    import transformers

    published = EMBEDDERS[name]
    is_read = read_encoder_spec if is_encoder(published) else read_any_spec
    num_parameters = is_read(write(tmp_path, published)).num_parameters
    if name == "e5-mistral-7b":  # a head would be counted
        num_parameters -= published["vocab_size"] * published["hidden_size"]
    assert abs(num_parameters / 1e6 / MILLIONS[name] - 1) < 0.01

    config = shrunk_encoder(published) if is_encoder(published) else shrunk(copy.deepcopy(published))
    write(tmp_path, config)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(theirs, dtype=torch.float32, attn_implementation="eager")
    fill_at_random(model.eval(), type(model).__name__)
    model.save_pretrained(tmp_path)
    write(tmp_path, config)
    mode = DOCUMENTED_POOLING[name]
    write_modules(tmp_path, pooling(mode), NORMALIZE)
    texts = random_texts(12, 90)
    vectors = embed(load(tmp_path, dtype="float32"), texts)
    expected = expected_vectors(model, texts, mode)
    assert np.abs(vectors - expected).max() <= 1e-4
    assert (1 - (vectors * expected).sum(1)).max() < 1e-6
