"""Chat models that embed by --pooling, on the weights that generate, against transformers' hidden states."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helpers.embedding_models import expected_vectors, random_texts
from helpers.tiny_models import VOCAB_SIZE, make_model, save_model
from parity.test_adapter_embeddings import assert_close, engine_of

CHUNK = 64
MODES = {"mean": "mean_tokens", "last": "lasttoken", "cls": "cls_token", "max": "max_tokens"}


@pytest.mark.parametrize("kind", ["llama3", "gemma2", "gpt_oss", "stablelm", "deepseek_v3"])
def test_every_pooling_of_a_decoder_is_transformers(kind: str, tmp_path: Path) -> None:
    """Native ones and some that run through transformers; texts of up to three chunks, each alone, too."""
    model = make_model(kind)
    directory = save_model(model, tmp_path)
    texts = random_texts(8, 3 * CHUNK, vocab_size=VOCAB_SIZE)
    for mode, theirs in MODES.items():
        with engine_of(directory, pooling=mode, chunked_prefill_size=CHUNK) as engine:
            vectors = engine.embed(texts)
            alone = np.concatenate([engine.embed([text]) for text in texts])
        assert_close(vectors, expected_vectors(model.model, texts, theirs))
        assert (alone.view(np.int32) == vectors.view(np.int32)).all()
