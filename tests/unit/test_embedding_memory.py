"""Whether an embedding model fits is told before it is loaded: its weights, and what it holds of texts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from engine._native import ExecutionContext
from engine.config.engine_config import EngineConfig
from engine.core import build, build_embedding
from engine.core.build_embedding import beside_embedding, embedding_bytes, load_embedder
from engine.core.resolve import Machine, resolve
from engine.errors import ConfigError
from engine.models.any_model import read_any_spec
from engine.models.encoder_registry import read_encoder_spec
from engine.models.registry import read_spec
from engine.runner.gpu import Gpu
from engine.runner.memory import DEQUANTIZING_BYTES, block_bytes, weight_bytes
from helpers.embedding_models import NORMALIZE, make_model, pooling, write_modules
from helpers.quantized_checkpoints import write_quantized
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


def test_rows_and_blocks_of_an_encoder_count(tmp_path: Path) -> None:
    make_model("bert").save_pretrained(tmp_path)
    write_modules(tmp_path, pooling("mean_tokens"), NORMALIZE)
    spec = read_encoder_spec(tmp_path)
    needed = embedding_bytes(EngineConfig(model_path=str(tmp_path)), str(tmp_path), 2**40)
    context = ExecutionContext(1, "auto")
    embedder = load_embedder(EngineConfig(model_path=str(tmp_path)), str(tmp_path), context, None)
    encoder = embedder._encoder
    tensors = [value for value in vars(encoder).values() if isinstance(value, torch.Tensor)]
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    assert needed == 4 * spec.num_parameters + sum(held.values())


def test_layers_after_pooling_count(tmp_path: Path) -> None:
    make_model("bert").save_pretrained(tmp_path)
    config = EngineConfig(model_path=str(tmp_path))
    write_modules(tmp_path, pooling("mean_tokens"))
    plain = embedding_bytes(config, str(tmp_path), 2**40)
    dense = ("Dense", {"in_features": 64, "out_features": 1_000_000})
    write_modules(tmp_path, pooling("mean_tokens"), dense)
    assert embedding_bytes(config, str(tmp_path), 2**40) == plain + 4 * 64 * 1_000_000
    with pytest.raises(ConfigError, match="does not fit"):
        embedding_bytes(config, str(tmp_path), plain + 2**20)


@pytest.mark.parametrize("context", [None, 64])
def test_texts_that_the_chat_model_embeds_count(tmp_path: Path, context: int | None) -> None:
    """Pool and texts both fit, whether or not a whole context does; a flag that makes them not is told."""
    spec = read_spec(save_model(make_chat_model("llama", max_position_embeddings=65536), tmp_path))
    weights = weight_bytes(spec, "float32")
    block = block_bytes(spec, 16, "float32")
    config = EngineConfig(model_path=str(tmp_path), pooling="mean", context_length=context)
    for num_blocks in (3000, 20_000):
        machine = Machine(num_cores=1, memory_bytes=weights + num_blocks * block)
        found = resolve(config, spec, machine)
        texts = max(found.chunked_prefill_size, -(-found.context_length // 16))
        assert 0 < found.num_blocks + texts <= num_blocks
        full = dataclasses.replace(config, max_total_tokens=16 * num_blocks)
        with pytest.raises(ConfigError, match=r"^--pooling needs .* GiB for texts beside weights"):
            resolve(full, spec, machine)
        assert resolve(dataclasses.replace(full, pooling=None), spec, machine).num_blocks == num_blocks


@pytest.mark.parametrize(("kind", "largest"), [("llama", 256 * 128), ("stablelm", 192 * 128)])
def test_floats_of_a_matrix_that_is_dequantised_count(tmp_path: Path, kind: str, largest: int) -> None:
    write_quantized(tmp_path, "int-quantized", symmetric=False, kind=kind)
    spec = read_any_spec(tmp_path)
    assert spec.largest_dequantized == largest
    needed = weight_bytes(spec, "float32") + DEQUANTIZING_BYTES * spec.largest_dequantized
    config = EngineConfig(model_path=str(tmp_path), max_total_tokens=16, context_length=16)
    resolve(config, spec, Machine(num_cores=1, memory_bytes=needed))
    with pytest.raises(ConfigError, match="dequantising its largest matrix takes"):
        resolve(config, spec, Machine(num_cores=1, memory_bytes=needed - 1))


def test_what_is_packed_as_it_is_needs_no_floats(tmp_path: Path) -> None:
    write_quantized(tmp_path, "awq")
    assert read_any_spec(tmp_path).largest_dequantized == 0


# --- on a GPU

GIB = 2**30


def on_gpu(total: int = 80 * GIB, in_use: int = GIB, capability: tuple[int, int] = (9, 0)) -> Machine:
    gpu = Gpu("NVIDIA Test", capability, total, total - in_use)
    return Machine(num_cores=1, memory_bytes=2**40, gpu=gpu)


def test_what_does_not_fit_a_gpu_is_one_line_with_its_sum(tmp_path: Path) -> None:
    config = EngineConfig(model_path=str(write(tmp_path)), device="cuda")
    needed = embedding_bytes(config, str(tmp_path), 2**40)
    left = beside_embedding(config, str(tmp_path), on_gpu())
    assert (left.embedding_bytes, left.memory_bytes) == (needed, 2**40), "the host's memory is not asked for"
    small = on_gpu(round((needed + GIB) / 0.88) + 2)
    assert beside_embedding(config, str(tmp_path), small).embedding_bytes == needed
    told = (
        "^the embedding model does not fit: its weights take .* 0.88 of .* GiB - 1.0 GiB in use are there on"
    )
    with pytest.raises(ConfigError, match=told) as caught:
        beside_embedding(config, str(tmp_path), on_gpu(round((needed + GIB) / 0.88) - 4))
    assert "\n" not in caught.value.message


def test_what_a_gpu_does_not_embed_is_refused(tmp_path: Path) -> None:
    """Heads of a decoder that the kernels do not take, while those of an encoder may be small; fp8."""
    make_model("qwen3", head_dim=32).save_pretrained(tmp_path / "decoder")
    make_model("bert").save_pretrained(tmp_path / "encoder")
    config = EngineConfig(model_path="/m", device="cuda", pooling="mean")
    with pytest.raises(ConfigError, match="its heads have 32 elements; kernels take multiples of 16 from 64"):
        beside_embedding(config, str(tmp_path / "decoder"), on_gpu())
    assert beside_embedding(config, str(tmp_path / "encoder"), on_gpu()).embedding_bytes > 0
    make_model("qwen3").save_pretrained(tmp_path / "decoder")
    config = dataclasses.replace(config, quantization="fp8")
    with pytest.raises(ConfigError, match="fp8 needs a GPU of compute capability 8.9"):
        beside_embedding(config, str(tmp_path / "decoder"), on_gpu(capability=(8, 6)))
