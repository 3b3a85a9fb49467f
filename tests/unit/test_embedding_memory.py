"""Whether an embedding model fits is told before it is loaded: its weights, and what it holds of texts."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config.engine_config import EngineConfig
from engine.core import build, build_embedding
from engine.core.build_embedding import embedding_bytes
from engine.core.resolve import Machine
from engine.errors import ConfigError
from engine.models.registry import read_spec
from engine.runner.memory import block_bytes, weight_bytes
from helpers.embedding_models import NORMALIZE, make_model, pooling, write_modules
from helpers.tiny_models import make_model as make_chat_model
from helpers.tiny_models import save_model


def write(directory: Path, kind: str = "qwen3") -> Path:
    make_model(kind, max_position_embeddings=32768).save_pretrained(directory)
    return write_modules(directory, pooling("lasttoken"), NORMALIZE)


@pytest.mark.parametrize(("context", "num_blocks"), [(None, 2048), (8200, 513), (40, 512)])
def test_keys_and_values_of_the_longest_text_count(tmp_path: Path, context: int | None, num_blocks: int):
    config = EngineConfig(model_path=str(write(tmp_path)), context_length=context)
    spec = read_spec(tmp_path)
    texts = embedding_bytes(config, str(tmp_path), 2**40) - weight_bytes(spec, "float32")
    cache = num_blocks * block_bytes(spec, 16, "float32")
    assert cache < texts < cache + 2**22  # and the rows of a step


def test_a_text_that_sees_both_ways_is_held_as_a_whole(tmp_path: Path) -> None:
    one, other = (write(tmp_path / kind, kind) for kind in ("gemma3_both_ways", "qwen3"))
    needed = [embedding_bytes(EngineConfig(model_path=str(path)), str(path), 2**40) for path in (one, other)]
    rows = 4 * 32768 * 4 * 64  # the hidden states alone
    assert needed[0] > needed[1] + rows


def test_what_does_not_fit_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "embed")
    config = EngineConfig(model_path=str(path))
    needed = embedding_bytes(config, str(path), 2**40)
    assert embedding_bytes(config, str(path), needed) == needed
    lacks = Machine(num_cores=1, memory_bytes=needed - 1)
    monkeypatch.setattr(build_embedding.Machine, "this", lambda device="cpu": lacks)
    told = (
        r"^the embedding model does not fit: its weights take .* and texts of up to 32768 tokens .* available"
    )
    with pytest.raises(ConfigError, match=told + "; a lower --context-length takes less$"):
        build.build_engine(config)
    chat = save_model(make_chat_model("llama"), tmp_path / "chat")
    with pytest.raises(ConfigError, match=told + "$"):
        build.build_engine(EngineConfig(model_path=str(chat), embedding_model=str(path)))
