"""Embeddings with adapters: those of peft and transformers, and the same bits whoever shares the batch."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config.engine_config import EngineConfig
from engine.core.build import build_engine
from engine.core.messages import (
    AdapterLoaded,
    AdapterRef,
    Embedded,
    EmbedRequest,
    Failed,
    GenerateRequest,
    LoadAdapter,
    UnloadAdapter,
)
from engine.runner.decoder_embedder import DecoderEmbedder
from engine.sampling.params import SamplingParams
from helpers.adapters import LINEAR, MODULES, make_adapter, save_adapter
from helpers.embedding_models import make_model as make_embedding_model
from helpers.embedding_models import pooling, random_texts, write_modules
from helpers.native import FMA_ISAS
from helpers.tiny_models import make_model, save_model

LONGEST = 90
TEXTS = random_texts(9, LONGEST)
TARGETS = (LINEAR, MODULES, ("q_proj", "v_proj"), ("embed_tokens", "down_proj"), ("lm_head", "k_proj"))
RANKS = (8, 1, 16, 33, 4, 100)
HEADLESS = (
    (*LINEAR, "embed_tokens"),
    LINEAR,
    "all-linear",
    r"layers\.[01]\.(mlp\.up_proj|self_attn\.k_proj)",
)


class Engine:
    """The whole engine without its process."""

    def __init__(self, directory: Path, **config) -> None:
        config = {"dtype": "float32", "num_threads": 2, "max_total_tokens": 2048, **config}
        self.core, self.ready = build_engine(EngineConfig(model_path=str(directory), **config))

    def load(self, path: Path) -> AdapterRef:
        self.core.handle(LoadAdapter(str(path)))
        while True:
            for message in self.core.step():
                assert isinstance(message, AdapterLoaded) and message.error is None, message
                return AdapterRef(str(path), message.digest)

    def begin(self, name: str, texts: Sequence[list[int]], adapter: AdapterRef | None) -> None:
        self.core.handle(EmbedRequest.of(name, texts, adapter=adapter))

    def finish(self) -> dict[str, np.ndarray]:
        """Vectors of each request, when all have come."""
        vectors = {}
        while self.core.has_work:
            for message in self.core.step():
                assert not isinstance(message, Failed), message
                if isinstance(message, Embedded):
                    vectors[message.request_id] = message.matrix(self.ready.embedding.size)
        assert self.core.stats().num_adapters_in_use == 0
        return vectors

    def embed(self, texts: Sequence[list[int]], adapter: AdapterRef | None = None) -> np.ndarray:
        self.begin("one", texts, adapter)
        return self.finish()["one"]


@contextmanager
def engine_of(*arguments, **config) -> Iterator[Engine]:
    engine = Engine(*arguments, **config)
    try:
        yield engine
    finally:
        engine.core.close()


def mean_vectors(decoder) -> np.ndarray:
    """Mean pooling of the last hidden states, of length 1."""
    with torch.no_grad():
        states = [decoder(torch.tensor([text])).last_hidden_state[0].mean(0) for text in TEXTS]
    return torch.nn.functional.normalize(torch.stack(states)).numpy()


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    """The bounds that any two float32 implementations of a small model keep."""
    assert np.abs(actual - expected).max() <= 1e-4
    assert (1 - (actual * expected).sum(1)).max() < 1e-6


def check(engine: Engine, model, decoder, targets, rank: int, directory: Path, **fields) -> None:
    """Against peft; `decoder` is the part of the model that has no head."""
    wrapped = make_adapter(model, targets, rank=rank, seed=rank, **fields)
    try:
        expected = mean_vectors(decoder)
        ref = engine.load(save_adapter(wrapped, directory / "adapter"))
    finally:
        wrapped.unload()
    vectors = engine.embed(TEXTS, ref)
    assert_close(vectors, expected)
    if set(targets) != {"lm_head"}:
        assert np.abs(vectors - engine.embed(TEXTS)).max() > 0.01, "the adapter changes nothing"
    engine.core.handle(UnloadAdapter(ref.digest))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
def test_a_chat_model_with_adapters_is_peft(kind, tmp_path):
    model = make_model(kind, num_hidden_layers=2)
    cases = [*((module,) for module in MODULES if module != "lm_head"), *TARGETS]
    with engine_of(save_model(model, tmp_path / "base"), pooling="mean") as engine:
        for index, targets in enumerate(cases):
            check(engine, model, model.model, targets, RANKS[index % len(RANKS)], tmp_path)


@pytest.mark.parametrize("ending", ["Model", "ForCausalLM"])
def test_an_embedding_model_with_adapters_made_without_a_head_is_peft(ending, tmp_path):
    model = make_embedding_model("qwen3", ending)
    model.save_pretrained(tmp_path / "base")
    write_modules(tmp_path / "base", pooling("mean_tokens"), ("Normalize", None))
    decoder = model if ending == "Model" else model.model
    with engine_of(tmp_path / "base") as engine:
        assert not engine.ready.generates and engine.ready.embedding.takes_adapters
        for rank, targets in zip(RANKS, HEADLESS, strict=False):
            check(engine, decoder, decoder, targets, rank, tmp_path, task_type="FEATURE_EXTRACTION")
        if ending == "ForCausalLM":
            check(engine, model, decoder, MODULES, 4, tmp_path)


def test_an_adapter_that_is_thrown_out_leaves_memory(tmp_path):
    """Nothing of the last step keeps it, be it of generation or of embedding."""
    model = make_model("llama", num_hidden_layers=2)
    adapter = save_adapter(make_adapter(model, MODULES), tmp_path / "adapter")
    with engine_of(
        save_model(make_model("llama", num_hidden_layers=2), tmp_path / "base"), pooling="mean"
    ) as engine:
        for generates in (False, True):
            ref = engine.load(adapter)
            weights = weakref.ref(engine.core._adapters._entries[ref.digest].weights)
            if generates:
                params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
                prompt = np.array(TEXTS[1], "<i4").tobytes()
                engine.core.handle(GenerateRequest("g", prompt, params, adapter=ref))
                engine.finish()
            else:
                engine.embed(TEXTS, ref)
            engine.core.handle(UnloadAdapter(ref.digest))
            gc.collect()
            assert weights() is None


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A bf16 model and eight adapters of it."""
    directory = tmp_path_factory.mktemp("adapters")
    model = make_model("mistral")
    base = save_model(model.bfloat16(), directory / "base")
    model = model.float()
    paths = []
    for number in range(8):
        wrapped = make_adapter(model, TARGETS[number % 4], rank=RANKS[number % 5], seed=number)
        paths.append(save_adapter(wrapped, directory / f"a{number}"))
        model = wrapped.unload()
    return base, paths


@pytest.fixture(scope="module")
def alone(files):
    """The vectors of each adapter and of the base, one text at a time."""
    with engine_of(files[0], pooling="mean", dtype="bfloat16") as engine:
        refs = [None, *map(engine.load, files[1])]
        vectors = [np.concatenate([engine.embed([text], ref) for text in TEXTS]) for ref in refs]
    assert len({v.tobytes() for v in vectors}) == len(refs)
    return vectors


@pytest.mark.parametrize(
    "config",
    [
        {}, {"chunked_prefill_size": 16}, {"max_loras_per_batch": 2, "max_loaded_loras": 2},
        {"num_threads": 1}, *({"cpu_isa": isa} for isa in FMA_ISAS),
    ],
    ids=str,
)  # fmt: skip
def test_the_same_bits_beside_all_others(files, alone, config, monkeypatch):
    """In batches with other adapters and the base, in chunks, and while some of them generate."""
    shared = []
    compute = DecoderEmbedder.compute

    def noting(self, texts, second_starts, adapters):
        shared.append(len(set(adapters)))
        return compute(self, texts, second_starts, adapters)

    monkeypatch.setattr(DecoderEmbedder, "compute", noting)
    with engine_of(files[0], pooling="mean", **{"dtype": "bfloat16", **config}) as engine:
        refs = [None, *map(engine.load, files[1])]
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        for number, ref in enumerate(refs):
            engine.begin(f"{number}", TEXTS, ref)
            prompt = np.array(TEXTS[number], "<i4").tobytes()
            engine.core.handle(GenerateRequest(f"g{number}", prompt, params, adapter=ref))
        vectors = engine.finish()
        few = config.get("max_loras_per_batch")
        if not few:  # with two places, what shares a batch hangs on how fast the files are read
            assert max(shared) >= (2 if "chunked_prefill_size" in config else len(refs))
        assert (engine.core.stats().num_adapter_evictions > 0) == bool(few)
    for number, expected in enumerate(alone):
        assert (vectors[f"{number}"].view(np.int32) == expected.view(np.int32)).all(), number
