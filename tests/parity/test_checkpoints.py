"""The forms in which a checkpoint of the same model may come."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import CheckpointError
from engine.models.checkpoint_files import INDEX_FILE, SINGLE_FILE
from helpers.tiny_models import VOCAB_SIZE, make_model, save_model
from parity.driving import generate, make_runner

PROMPT = [5, 6, 7, 300, 5, 6]


def logits_of(directory, **options) -> torch.Tensor:
    return generate(make_runner(directory, **options), PROMPT, 4)[1]


def change_tensors(directory, change) -> None:
    tensors = load_file(directory / SINGLE_FILE)
    change(tensors)
    save_file(tensors, directory / SINGLE_FILE)


@pytest.mark.parametrize("kind", ["llama", "llama3"])
def test_shards_give_the_same_bits(tmp_path, kind):
    model = make_model(kind)
    single, sharded = (
        save_model(model, tmp_path / "a"),
        save_model(model, tmp_path / "b", max_shard_size="400KB"),
    )
    assert (sharded / INDEX_FILE).exists() and len(list(sharded.glob("*.safetensors"))) > 2
    assert torch.equal(logits_of(single), logits_of(sharded))


def test_known_left_overs_are_ignored(tmp_path):
    """A copy of the tied embedding as head, even another one, and stored rotary frequencies."""
    directory = save_model(make_model("llama3"), tmp_path)
    expected = logits_of(directory)

    def add(tensors):
        tensors["lm_head.weight"] = torch.zeros(VOCAB_SIZE, 128)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(32)

    change_tensors(directory, add)
    assert torch.equal(logits_of(directory), expected)


def test_an_untied_model_needs_its_head(tmp_path):
    directory = save_model(make_model("llama"), tmp_path)
    change_tensors(directory, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match="^the checkpoint lacks lm_head.weight$"):
        make_runner(directory)


@pytest.mark.parametrize("name", ["self_attn.q_proj.bias", "self_attn.o_proj.bias", "mlp.down_proj.bias"])
def test_biases_are_not_forgotten(tmp_path, name):
    directory = save_model(make_model("llama"), tmp_path)
    change_tensors(directory, lambda tensors: tensors.pop(f"model.layers.1.{name}"))
    with pytest.raises(CheckpointError, match=f"^the checkpoint lacks model.layers.1.{name}$"):
        make_runner(directory)


def test_norms_of_another_family_are_left_over(tmp_path):
    directory = save_model(make_model("qwen2"), tmp_path)
    change_tensors(
        directory, lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(64)})
    )
    with pytest.raises(CheckpointError, match=r"does not: model\.layers\.0\.self_attn\.q_norm\.weight$"):
        make_runner(directory)


def test_float16_becomes_what_dtype_says(tmp_path):
    half = save_model(make_model("mistral").half(), tmp_path / "half")
    full = save_model(make_model("mistral").half().float(), tmp_path / "full")
    for dtype in ("float32", "bfloat16"):
        assert torch.equal(logits_of(half, dtype=dtype), logits_of(full, dtype=dtype))
    assert not torch.equal(logits_of(half, dtype="float32"), logits_of(half, dtype="bfloat16"))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_dummy_weights_need_only_a_configuration(tmp_path, kind):
    (save_model(make_model(kind), tmp_path) / SINGLE_FILE).unlink()
    first, second = (logits_of(tmp_path, load_format="dummy") for _ in range(2))
    assert torch.equal(first, second)
    assert first.isfinite().all() and first.std() > 0
