"""Packed weights from the last start: the same bits, used only where they fit."""

from __future__ import annotations

import os

import pytest
import torch

from engine.config.engine_config import EngineConfig
from engine.errors import ConfigError
from helpers.tiny_models import make_model, save_model
from parity.driving import make_request, make_runner, step_logits

PROMPT = list(range(5, 45))
FORMATS = [("bfloat16", "none"), ("float32", "none"), ("float32", "int8"), ("float32", "int4")]


def logits(directory, cache, **options) -> torch.Tensor:
    runner = make_runner(directory, packed_cache=cache, **options)
    return step_logits(runner, make_request(PROMPT), len(PROMPT))


@pytest.fixture
def directory(tmp_path):
    model = make_model("qwen2")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:, 7] *= 50  # so that columns are scaled
    return save_model(model, tmp_path / "model")


def spoil(directory) -> None:
    """Other weights under the same name, size and time."""
    path = directory / "model.safetensors"
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-200_000:] = bytes(200_000)
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(("dtype", "quantization"), FORMATS)
def test_the_second_start_reads_what_the_first_one_packed(directory, tmp_path, dtype, quantization):
    options = {"dtype": dtype, "quantization": quantization}
    expected = logits(directory, None, **options)
    cache = tmp_path / "deep" / "cache"
    assert torch.equal(logits(directory, cache, **options), expected)
    assert len(list(cache.iterdir())) == 2
    spoil(directory)
    assert not torch.equal(logits(directory, None, **options), expected)
    assert torch.equal(logits(directory, cache, **options), expected)
    assert torch.equal(logits(directory, cache, map_packed_cache=True, **options), expected)


def test_formats_and_changed_checkpoints_have_entries_of_their_own(directory, tmp_path):
    for dtype, quantization in FORMATS:
        logits(directory, tmp_path / "cache", dtype=dtype, quantization=quantization)
    spoil(directory)
    os.utime(directory / "model.safetensors")
    expected = logits(directory, None)
    assert torch.equal(logits(directory, tmp_path / "cache"), expected)
    assert len(list((tmp_path / "cache").iterdir())) == 2 * (len(FORMATS) + 1)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("damage", ["shorter", "empty", "gone", "longer"])
@pytest.mark.parametrize("is_mapped", [False, True])
def test_damaged_files_are_made_again(directory, tmp_path, caplog, suffix, damage, is_mapped):
    cache = tmp_path / "cache"
    expected = logits(directory, cache, quantization="int8")
    (path,) = cache.glob(f"*{suffix}")
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"shorter": content[:-5000], "empty": b"", "longer": content + b"x"}[damage])
    again = logits(directory, cache, quantization="int8", map_packed_cache=is_mapped)
    assert torch.equal(again, expected)
    assert path.read_bytes() == content
    assert "packed weights" in caplog.text or (damage, suffix) == ("gone", ".safetensors")


def test_a_directory_that_cannot_be_written_costs_only_a_warning(directory, tmp_path, caplog):
    cache = tmp_path / "cache"
    expected = logits(directory, cache)
    (path,) = cache.glob("*.safetensors")
    path.unlink()
    path.mkdir()  # nothing can take its name
    assert torch.equal(logits(directory, cache), expected)
    assert "cannot be kept" in caplog.text
    assert not list(cache.glob("*.tmp"))


def test_wrong_directories_and_flags_are_refused(directory, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--packed-cache .*file/cache: Not a directory"):
        logits(directory, tmp_path / "file" / "cache")
    with pytest.raises(ConfigError, match="--map-packed-cache needs --packed-cache"):
        EngineConfig(model_path="/m", map_packed_cache=True)
