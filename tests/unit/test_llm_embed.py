"""`LLM.embed` and `AsyncEngine.embed`: order, limits, errors, and that generation beside them goes on."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine import LLM, AsyncEngine, EngineError, SamplingParams
from engine.config.model_location import bundled_adapters
from engine.core import llm as llm_module
from engine.errors import InvalidRequest
from helpers.embedding_models import MINILM, make_model

TEXTS = ["one text", "another text, a little longer", "x", "the third " * 20]


@pytest.fixture(scope="module")
def bundled() -> Iterator[LLM]:
    with LLM(num_threads=2, max_total_tokens=4096) as llm:
        yield llm


@pytest.fixture(scope="module")
def minilm() -> Iterator[LLM]:
    with LLM(str(MINILM), num_threads=2) as llm:
        yield llm


def test_one_many_and_token_ids(bundled: LLM) -> None:
    vectors = bundled.embed(TEXTS)
    assert vectors.shape == (4, 256) and vectors.dtype == np.float32
    for i, text in enumerate(TEXTS):
        assert (bundled.embed(text) == vectors[i : i + 1]).all()
    assert (bundled.embed([bundled.tokenizer.encode(text) for text in TEXTS]) == vectors).all()
    assert bundled.embed([]).shape == (0, 256)


def test_more_texts_than_go_at_once(minilm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = minilm.embed(TEXTS * 5)
    monkeypatch.setattr(llm_module, "EMBED_AT_ONCE", 3)
    assert (minilm.embed(TEXTS * 5) == whole).all()


def test_it_generates_as_if_nothing_was_embedded(bundled: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=20)
    before = bundled.generate("The capital of", params, use_tqdm=False)[0].outputs[0].token_ids
    bundled.embed(TEXTS)
    after = bundled.generate("The capital of", params, use_tqdm=False)[0].outputs[0].token_ids
    assert after == before


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (["a", []], {}, "empty"),
        (["a " * 5000], {}, "longer than the 256 tokens"),
        ([[999_999]], {}, "outside of"),
        ([[-1]], {}, "outside of"),
        (["a"], {"dimensions": 100}, "dimensions must be 384"),
        (["a"], {"prompt_name": "query"}, "no prompt 'query'"),
    ],
)
def test_what_cannot_be_embedded(minilm: LLM, inputs: list, options: dict, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        minilm.embed(inputs, **options)
    assert minilm.embed("a").shape == (1, 384), "it goes on"


def test_with_adapters(bundled: LLM) -> None:
    voices = sorted(bundled_adapters())
    paths = [*voices, None, voices[0]]
    vectors = bundled.embed(TEXTS, lora_path=paths)
    for text, path, vector in zip(TEXTS, paths, vectors, strict=True):
        assert (bundled.embed(text, lora_path=path) == vector).all()
        assert path is None or (bundled.embed(text) != vector).any()
    assert (bundled.embed(TEXTS, lora_path=voices[0])[3] == vectors[3]).all()
    with pytest.raises(InvalidRequest, match="adapter_config.json"):
        bundled.embed("a", lora_path="/nonexistent")
    with pytest.raises(InvalidRequest, match="2 adapters for 1"):
        bundled.embed("a", lora_path=voices)
    assert bundled._core.stats().num_adapters_in_use == 0

    async def run() -> np.ndarray:
        async with AsyncEngine(num_threads=2, max_total_tokens=4096) as engine:
            asks = (engine.embed([t], lora_path=p) for t, p in zip(TEXTS, paths, strict=True))
            return np.concatenate(await asyncio.gather(*asks))

    assert (asyncio.run(run()) == vectors).all()


def test_an_encoder_takes_no_adapters(minilm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="takes no adapters"):
        minilm.embed("a", lora_path=str(bundled_adapters()["pirate"]))


def test_a_model_that_scores_pairs_makes_no_vectors(tmp_path: Path) -> None:
    model = make_model("bert", "ForSequenceClassification", num_labels=1, vocab_size=30522)
    model.save_pretrained(tmp_path)
    shutil.copy(MINILM / "tokenizer.json", tmp_path)
    with LLM(str(tmp_path), num_threads=1) as llm:
        for text in ("a", [101, 102]):
            with pytest.raises(InvalidRequest, match="the model scores pairs of texts"):
                llm.embed(text)


def test_models_that_do_only_one_of_both(minilm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="makes embeddings and no text"):
        minilm.generate("a", use_tqdm=False)
    with (
        LLM(pooling=None, num_threads=1, max_total_tokens=4096) as llm,
        pytest.raises(InvalidRequest, match="pooling='mean'"),
    ):
        llm.embed("a")
    with pytest.raises(EngineError, match="closed"):
        llm.embed("a")


def test_async_engine_embeds_the_same(minilm: LLM) -> None:
    async def run() -> np.ndarray:
        async with AsyncEngine(str(MINILM), num_threads=2) as engine:
            parts = await asyncio.gather(*(engine.embed([text]) for text in TEXTS))
            with pytest.raises(InvalidRequest, match="makes embeddings and no text"):
                async for _ in engine.generate("a"):
                    pass
            return np.concatenate(parts)

    assert (asyncio.run(run()) == minilm.embed(TEXTS)).all()
