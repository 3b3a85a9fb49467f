"""Vectors against sentence-transformers and transformers, and bit for bit against themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engine.config.model_location import locate_model
from engine.core.build_embedding import only_embeds
from engine.models.embedding_spec import read_embedding_spec
from engine.text.tokenizer import Tokenizer
from helpers.embedding_models import (
    KINDS,
    MINILM,
    NORMALIZE,
    POOLINGS,
    embed,
    expected_vectors,
    hidden_states,
    load,
    make_model,
    pooling,
    random_texts,
    write_modules,
)
from helpers.native import FMA_ISAS

LONGEST = 290


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    """The bounds that any two float32 implementations of a small model keep."""
    scale = np.linalg.norm(expected, axis=1, keepdims=True)
    assert (np.abs(actual - expected) <= 1e-4 * np.maximum(scale, 1)).all()
    cosine = (actual * expected).sum(1) / (np.linalg.norm(actual, axis=1) * scale[:, 0])
    assert (1 - cosine).max() < 1e-6


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model, with the limit of its positions, not of its training."""
    directory = tmp_path_factory.mktemp("minilm") / "model"
    shutil.copytree(MINILM, directory)
    (directory / "sentence_bert_config.json").write_text('{"max_seq_length": 512}')
    return directory


def test_minilm_is_sentence_transformers_and_alone_is_batched_bitwise(minilm: Path) -> None:
    """500 texts from 2 tokens, which is the empty one, to 512, each of them alone too; and one token."""
    import sentence_transformers

    tokenizer = Tokenizer.from_directory(minilm)
    vocabulary = sorted(json.loads((minilm / "tokenizer.json").read_text())["model"]["vocab"])
    words = [word for word in vocabulary if not word.startswith(("[", "##"))]
    words = [w for w, ids in zip(words, tokenizer.encode_batch(words), strict=True) if len(ids) == 3]
    generator = np.random.default_rng(0)
    lens = np.exp(generator.uniform(0, 1, 500) ** 2 * np.log(511)).astype(int)  # many are short
    lens[:2] = 0, 510
    texts = [" ".join(generator.choice(words, length)) for length in lens]
    ids = tokenizer.encode_batch(texts)
    assert [len(text) for text in ids] == [length + 2 for length in lens]
    core = load(minilm, num_threads=2)
    batched = embed(core, [*ids, [101]])
    model = sentence_transformers.SentenceTransformer(str(minilm), device="cpu")
    assert_close(batched[:-1], model.encode(texts, show_progress_bar=False))
    assert_close(batched[-1:], expected_vectors(model[0].auto_model, [[101]], "mean_tokens"))
    alone = np.concatenate([embed(core, [text]) for text in [*ids, [101]]])
    assert (alone.view(np.int32) == batched.view(np.int32)).all()


def test_a_transformer_in_a_folder_of_its_own(minilm: Path, tmp_path: Path) -> None:
    """As old versions of sentence-transformers saved: outside of it are only lists and small modules."""
    import sentence_transformers

    dense = {"in_features": 384, "out_features": 8, "bias": False, "activation_function": "torch.nn.Tanh"}
    shutil.copytree(minilm, tmp_path / "0_Transformer", ignore=shutil.ignore_patterns("modules.json", "1_*"))
    prompts = {"prompts": {"query": "ask: "}, "default_prompt_name": "query"}
    settings = {"config_sentence_transformers": prompts}
    write_modules(tmp_path, pooling("mean_tokens"), ("Dense", dense), NORMALIZE, **settings)
    save_file({"linear.weight": torch.randn(8, 384)}, tmp_path / "2_Dense" / "model.safetensors")
    listed = json.loads((tmp_path / "modules.json").read_text())
    listed[0]["path"] = "0_Transformer"
    (tmp_path / "modules.json").write_text(json.dumps(listed))

    directory = locate_model(str(tmp_path))
    assert directory == tmp_path / "0_Transformer" and only_embeds(str(directory))
    spec = read_embedding_spec(directory)
    assert (spec.max_len, spec.default_prompt, spec.dense[0].folder) == (512, "query", "2_Dense")
    texts = ["a dog", "the capital of France is Paris"]
    ids = Tokenizer.from_directory(directory).encode_batch(["ask: " + text for text in texts])
    model = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    assert_close(embed(load(directory), ids), model.encode(texts, show_progress_bar=False))


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_is_transformers(kind: str, tmp_path: Path) -> None:
    model = make_model(kind)
    model.save_pretrained(tmp_path)
    mode = {"qwen3": "lasttoken", "mistral": "lasttoken", "bert": "cls_token"}.get(kind, "mean_tokens")
    write_modules(tmp_path, pooling(mode), NORMALIZE)
    texts = random_texts(40, LONGEST)
    core = load(tmp_path)
    assert core.info.max_len >= LONGEST
    vectors = embed(core, texts)
    assert_close(vectors, expected_vectors(model, texts, mode))
    for isa in FMA_ISAS:
        other = load(tmp_path, isa, 1)
        alone = np.concatenate([embed(other, [text]) for text in texts[:12]])
        assert (alone.view(np.int32) == vectors[:12].view(np.int32)).all()


@pytest.mark.parametrize("kind", ["gemma3_both_ways", "qwen2_both_ways"])
def test_a_text_that_sees_both_ways_is_computed_whole(kind: str, tmp_path: Path) -> None:
    """As EmbeddingGemma and gte-Qwen2, in batches that are smaller than a text; and with a head it does not
    generate, either."""
    model = make_model(kind, "ForCausalLM" if kind.startswith("qwen2") else "Model")
    model.save_pretrained(tmp_path)
    assert only_embeds(tmp_path)
    write_modules(tmp_path, pooling("mean_tokens"), NORMALIZE)
    texts = random_texts(12, 200)
    expected = expected_vectors(getattr(model, "model", model), texts, "mean_tokens")
    core = load(tmp_path, chunked_prefill_size=32)
    assert core._embedder.max_step_tokens == 32  # of short texts no more go together for it
    vectors = embed(core, texts)
    assert_close(vectors, expected)
    alone = np.concatenate([embed(core, [text]) for text in texts])
    assert (alone.view(np.int32) == vectors.view(np.int32)).all()
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"use_bidirectional_attention": False, "is_causal": True}
    config["sliding_window"] = None if kind.startswith("qwen2") else 20
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert np.abs(embed(load(tmp_path), texts) - expected).max() > 0.01  # it matters


@pytest.mark.parametrize("mode", POOLINGS)
@pytest.mark.parametrize("kind", ["bert", "qwen3"])
def test_every_pooling_as_it_comes(kind: str, mode: str, tmp_path: Path) -> None:
    model = make_model(kind, seed=1)
    model.save_pretrained(tmp_path)
    write_modules(tmp_path, pooling(mode))
    texts = random_texts(12, 100, seed=1)
    expected = expected_vectors(model, texts, mode, normalize=False)
    assert_close(embed(load(tmp_path), texts), expected)
    if kind == "qwen3":  # in chunks, which pooling must not notice
        assert_close(embed(load(tmp_path, chunked_prefill_size=32), texts), expected)


def test_several_poolings_dense_layers_and_a_norm(tmp_path: Path) -> None:
    from sentence_transformers.sentence_transformer.modules import LayerNorm

    model = make_model("bert", seed=2)
    model.save_pretrained(tmp_path)
    sizes = [(128, 48, "torch.nn.modules.activation.Tanh"), (48, 32, "torch.nn.modules.linear.Identity")]
    dense = [
        ("Dense", {"in_features": i, "out_features": o, "bias": i == 128, "activation_function": name})
        for i, o, name in sizes
    ]
    dense.insert(1, ("LayerNorm", {"dimension": 48}))
    write_modules(tmp_path, pooling("cls_token", "mean_tokens"), *dense, NORMALIZE)
    norm = LayerNorm(48)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, 1.0, 0.5)
    norm.save(str(tmp_path / "3_LayerNorm"))
    weights = [torch.randn(o, i) / i**0.5 for i, o, _ in sizes]
    bias = torch.randn(48)
    save_file({"linear.weight": weights[0], "linear.bias": bias}, tmp_path / "2_Dense" / "model.safetensors")
    save_file({"linear.weight": weights[1]}, tmp_path / "4_Dense" / "model.safetensors")
    texts = random_texts(10, 60)
    pooled = torch.stack(
        [
            torch.cat([POOLINGS[m](hidden_states(model, t)) for m in ("cls_token", "mean_tokens")])
            for t in texts
        ]
    )
    normed = norm({"sentence_embedding": torch.tanh(pooled @ weights[0].T + bias)})["sentence_embedding"]
    expected = torch.nn.functional.normalize(normed.detach() @ weights[1].T)
    assert_close(embed(load(tmp_path), texts), expected.numpy())


def test_pooling_by_flag_is_normalised(tmp_path: Path) -> None:
    model = make_model("roberta", seed=3)
    model.save_pretrained(tmp_path)
    texts = random_texts(6, 50)
    assert_close(embed(load(tmp_path, pooling="cls"), texts), expected_vectors(model, texts, "cls_token"))


@pytest.mark.parametrize(("kind", "ending"), [("bert", "ForMaskedLM"), ("qwen3", "ForCausalLM")])
def test_a_head_is_left_alone(kind: str, ending: str, tmp_path: Path) -> None:
    """As published: BERT with its head for masked words, Qwen3-Embedding as a causal model."""
    model = make_model(kind, ending, seed=4)
    model.save_pretrained(tmp_path)
    write_modules(tmp_path, pooling("mean_tokens"), NORMALIZE)
    texts = random_texts(6, 50)
    assert_close(embed(load(tmp_path), texts), expected_vectors(model.base_model, texts, "mean_tokens"))


@pytest.mark.parametrize("kind", ["roberta", "xlm_roberta"])
def test_a_text_may_hold_padding_tokens(kind: str, tmp_path: Path) -> None:
    """Who writes "<pad>" gets one, and positions of these families pass it over."""
    model = make_model(kind, seed=6)
    model.save_pretrained(tmp_path)
    write_modules(tmp_path, pooling("mean_tokens"), NORMALIZE)
    texts = [[1, *text[:3], 1, 1, *text[3:]] for text in random_texts(8, 40)] + random_texts(4, 20) + [[1]]
    assert_close(embed(load(tmp_path), texts), expected_vectors(model, texts, "mean_tokens"))


def test_other_dtypes(tmp_path: Path) -> None:
    model = make_model("bert", seed=5)
    texts = random_texts(6, 50)
    for dtype, bound in ((torch.float16, 3e-3), (torch.bfloat16, 3e-2)):
        directory = tmp_path / str(dtype)
        model.to(dtype).save_pretrained(directory)
        write_modules(directory, pooling("mean_tokens"), NORMALIZE)
        model.float()
        expected = expected_vectors(model, texts, "mean_tokens")
        assert np.abs(embed(load(directory), texts) - expected).max() < bound
