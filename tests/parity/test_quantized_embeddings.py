"""Decoders that embed from weights in few bits: the vectors of the numbers that those stand for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from engine.errors import CheckpointError, ConfigError
from engine.models.embedding_spec import read_embedding_spec
from helpers.embedding_models import (
    NORMALIZE,
    embed,
    expected_vectors,
    load,
    make_model,
    pooling,
    random_texts,
    write_modules,
)
from helpers.gguf_files import write_gguf
from helpers.quantized_checkpoints import write_quantized


def assert_alike(vectors: np.ndarray, expected: np.ndarray, worst: float) -> None:
    distances = 1 - (vectors * expected).sum(1)
    assert distances.max() < worst, distances.max()


def without_prefix(directory: Path) -> None:
    """As a model without a head is saved."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    save_file({n.removeprefix("model."): t for n, t in tensors.items() if n != "lm_head.weight"}, path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen3Model"]}))


@pytest.mark.parametrize("has_head", [True, False])
@pytest.mark.parametrize("method", ["awq", "gptq", "pack-quantized", "int-quantized"])
def test_a_checkpoint_in_few_bits_embeds(tmp_path: Path, method: str, has_head: bool) -> None:
    """What remains is that activations have 8 bits; weights in a wrong place would be at a distance of 1."""
    model = write_quantized(tmp_path, method, kind="qwen3")
    if not has_head:
        without_prefix(tmp_path)
    write_modules(tmp_path, pooling("lasttoken"), NORMALIZE)
    texts = random_texts(12, 60)
    core = load(tmp_path)
    vectors = embed(core, texts)
    assert_alike(vectors, expected_vectors(model.model, texts, "lasttoken"), 3e-3)
    alone = np.concatenate([embed(core, [text]) for text in texts])
    assert (alone.view(np.int32) == vectors.view(np.int32)).all()


@pytest.mark.parametrize(("kind", "worst"), [("F32", 1e-6), ("Q8_0", 3e-3)])
def test_a_gguf_file_embeds_as_it_says(tmp_path: Path, kind: str, worst: float) -> None:
    model = make_model("qwen3", "ForCausalLM", tie_word_embeddings=False)
    path = write_gguf(tmp_path / "e.gguf", model, lambda name: kind, metadata={"qwen3.pooling_type": 3})
    spec = read_embedding_spec(path)
    assert (spec.pooling, spec.is_normalized) == (("last",), True)
    texts = random_texts(12, 60)
    assert_alike(embed(load(path), texts), expected_vectors(model.model, texts, "lasttoken"), worst)


@pytest.mark.parametrize("value", [4, 9, "last", [3]])
def test_other_poolings_of_gguf_files_are_refused(tmp_path: Path, value) -> None:
    model = make_model("qwen3", "ForCausalLM")
    path = write_gguf(tmp_path / "e.gguf", model, metadata={"qwen3.pooling_type": value})
    with pytest.raises(
        CheckpointError, match="for pooling_type, which is not supported; supported: 1 .mean."
    ):
        load(path)


def test_a_gguf_file_that_does_not_say_how_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "e.gguf", make_model("qwen3", "ForCausalLM"))
    with pytest.raises(ConfigError, match="^e.gguf does not say how .*give --pooling"):
        load(path)


def test_weights_are_rounded_at_load_where_the_flag_says_so(tmp_path: Path) -> None:
    model = make_model("qwen3")
    model.save_pretrained(tmp_path)
    write_modules(tmp_path, pooling("lasttoken"), NORMALIZE)
    texts = random_texts(12, 60)
    vectors = embed(load(tmp_path, quantization="int8"), texts)
    assert_alike(vectors, expected_vectors(model, texts, "lasttoken"), 3e-3)
    exact = embed(load(tmp_path), texts)
    assert (vectors != exact).any()
    beside = load(tmp_path, quantization="int8", embedding_model=str(tmp_path))
    assert (embed(beside, texts) == exact).all()  # there the flag is for the chat model


def test_an_encoder_is_not_rounded(tmp_path: Path) -> None:
    make_model("bert").save_pretrained(tmp_path)
    write_modules(tmp_path, pooling("mean_tokens"))
    with pytest.raises(ConfigError, match="--quantization int8 is not supported for encoders"):
        load(tmp_path, quantization="int8")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="quantization_config is not supported for an encoder"):
        load(tmp_path)
