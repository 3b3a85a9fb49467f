"""Scores of pairs against transformers' classification models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.core.messages import EmbedRequest
from engine.errors import ConfigError
from helpers.embedding_models import answer_of, load, make_model, random_texts

_MEAN = {"classifier_pooling": "mean", "classifier_bias": True, "classifier_activation": "relu"}
KINDS = [
    ("bert", {}), ("roberta", {}), ("xlm_roberta", {}), ("distilbert", {}), ("modernbert", {}),
    ("modernbert", _MEAN),
]  # fmt: skip


def scores(core, pairs: list[tuple[list[int], list[int]]]) -> np.ndarray:
    request = EmbedRequest.of("a", [a + b for a, b in pairs], [len(a) for a, _ in pairs])
    return answer_of(core, request).matrix(1)[:, 0]


def reference(model, pairs: list[tuple[list[int], list[int]]], *, has_types: bool) -> np.ndarray:
    found = []
    for first, second in pairs:
        types = {"token_type_ids": torch.tensor([[0] * len(first) + [1] * len(second)])} if has_types else {}
        with torch.no_grad():
            found.append(model(torch.tensor([first + second]), **types).logits[0, 0])
    return torch.stack(found).numpy()


@pytest.mark.parametrize(("kind", "changes"), KINDS)
def test_scores_are_transformers(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(kind, "ForSequenceClassification", num_labels=1, **changes)
    model.save_pretrained(tmp_path)
    texts = random_texts(24, 100)
    pairs = list(zip(texts[:12], texts[12:], strict=True))
    logits = reference(model, pairs, has_types=kind == "bert")
    core = load(tmp_path)
    assert core.info.scores_pairs and core.info.size == 1
    batched = scores(core, pairs)
    assert np.abs(batched - 1 / (1 + np.exp(-logits.astype(np.float64)))).max() < 1e-5
    alone = np.concatenate([scores(core, [pair]) for pair in pairs])
    assert (alone == batched).all()


def test_an_activation_of_the_checkpoint(tmp_path: Path) -> None:
    model = make_model("bert", "ForSequenceClassification", num_labels=1)
    model.config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
    model.save_pretrained(tmp_path)
    pairs = [([5, 6], [7]), ([9], [8, 7, 6])]
    assert np.abs(scores(load(tmp_path), pairs) - reference(model, pairs, has_types=True)).max() < 1e-4


def test_what_sentence_transformers_keeps_beside_the_configuration(tmp_path: Path) -> None:
    model = make_model("bert", "ForSequenceClassification", num_labels=1)
    model.save_pretrained(tmp_path)
    settings = {"activation_fn": "torch.nn.modules.linear.Identity", "prompts": {}}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(settings))
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 20}')
    pairs = [([5, 6], [7]), ([9], [8, 7, 6])]
    core = load(tmp_path)
    assert core.info.max_len == 20
    assert np.abs(scores(core, pairs) - reference(model, pairs, has_types=True)).max() < 1e-4
    assert load(tmp_path, context_length=10).info.max_len == 10
    settings |= {"prompts": {"query": "q: "}, "default_prompt_name": "query"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="default prompt for pairs is unsupported"):
        load(tmp_path)


def test_models_that_are_refused(tmp_path: Path) -> None:
    model = make_model("bert", "ForSequenceClassification", num_labels=3)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="tells 3 labels apart"):
        load(tmp_path)
    model = make_model("bert", "ForSequenceClassification", num_labels=1)
    model.config.sbert_ce_default_activation_function = "os.system"
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="activation 'os.system' is not supported"):
        load(tmp_path)
