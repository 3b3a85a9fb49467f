"""Packed weights from the last start: the same bits, used only where they fit."""

from __future__ import annotations

import fcntl
import gc
import hashlib
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config.engine_config import EngineConfig
from engine.errors import CheckpointError, ConfigError
from engine.models import packed_cache
from engine.models.packed_cache import PackedCache
from engine.ops.linear import PackedMatrix
from engine.runner.model_runner import ModelRunner
from helpers.native import FMA_ISAS, context
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


def replace_weights(directory) -> None:
    """Other weights under the same name, size and time."""
    path = directory / "model.safetensors"
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-200_000:] = bytes(200_000)
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def no_checkpoint(monkeypatch):
    """From its call on, weights come from the cache or not at all."""

    def refuse(*_: object) -> None:
        raise AssertionError("the checkpoint was read")

    return lambda: monkeypatch.setattr(ModelRunner, "_load", refuse)


@pytest.mark.parametrize(("dtype", "quantization"), FORMATS)
def test_the_second_start_reads_what_the_first_one_packed(
    directory, tmp_path, dtype, quantization, no_checkpoint
):
    options = {"dtype": dtype, "quantization": quantization}
    expected = logits(directory, None, **options)
    cache = tmp_path / "deep" / "cache"
    assert torch.equal(logits(directory, cache, **options), expected)
    assert len(list(cache.iterdir())) == 2
    no_checkpoint()
    assert torch.equal(logits(directory, cache, **options), expected)
    assert torch.equal(logits(directory, cache, map_packed_cache=True, **options), expected)


@pytest.mark.parametrize("is_mapped", [False, True])
def test_mapped_weights_lie_in_their_file_from_the_first_start_on(directory, tmp_path, is_mapped):
    for _ in range(2):
        runner = make_runner(directory, packed_cache=tmp_path / "cache", map_packed_cache=is_mapped)
        (path,) = (tmp_path / "cache").glob("*.bin")
        assert (str(path) in Path("/proc/self/maps").read_text()) == is_mapped
        found = step_logits(runner, make_request(PROMPT), len(PROMPT))
        assert torch.equal(found, logits(directory, None))
        del runner
        gc.collect()


def test_who_may_read_one_file_may_read_the_other(directory, tmp_path):
    logits(directory, tmp_path / "cache")
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "cache").iterdir()}
    assert len(modes) == 1


def test_formats_have_entries_of_their_own(directory, tmp_path):
    for dtype, quantization in FORMATS:
        logits(directory, tmp_path / "cache", dtype=dtype, quantization=quantization)
    assert len(list((tmp_path / "cache").iterdir())) == 2 * len(FORMATS)


def test_another_checkpoint_of_the_same_name_size_and_time_is_another_one(directory, tmp_path):
    """As images and archives leave them, which give all files one time."""
    before = logits(directory, tmp_path / "cache")
    replace_weights(directory)
    expected = logits(directory, None)
    assert not torch.equal(before, expected)
    assert torch.equal(logits(directory, tmp_path / "cache"), expected)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 300_000, 50_000_000])
def test_samples_reach_from_the_first_byte_to_the_last(tmp_path, size):
    path = tmp_path / "weights"
    path.write_bytes(bytes(size))
    seen = {packed_cache._identity(path)[-1]}
    for place in {0, size - 1} - ({0, -1} if size == 0 else set()):
        changed = bytearray(size)
        changed[place] = 1
        path.write_bytes(changed)
        seen.add(packed_cache._identity(path)[-1])
    assert len(seen) == min(size, 2) + 1


def test_a_checkpoint_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read gone\.safetensors: No such file"):
        packed_cache._identity(tmp_path / "gone.safetensors")


PACKED_BYTES = {
    ("float32", 0): "5a7e8152bac3dbda",
    ("bfloat16", 0): "3c37f017d6124331",
    ("bf16_dot", 0): "3c37f017d6124331",
    ("int8", 128): "e8986680a4af539e",
    ("int8", 32): "9a34c9f701e7cf92",
    ("int4", 32): "81dd3e9e6dbce109",
    ("int4", 128): "43c87199a233b70f",
}


@pytest.mark.parametrize(("dtype", "group_len"), PACKED_BYTES)
def test_other_bytes_get_another_layout_number(tmp_path, dtype, group_len):
    """Who changes how weights are packed changes LAYOUT too, or a new version reads what an old one kept."""
    weight = (torch.arange(70 * 300) * 7919 % 257 - 128).view(70, 300) / 64
    weight[:, 5] *= 60
    matrix, ctx = PackedMatrix(70, 300, dtype, group_len), context(FMA_ISAS[0], 2)
    if dtype == "int8":
        matrix.balance_columns(ctx, [weight])
    matrix.pack_rows(ctx, 0, weight)
    with (tmp_path / "packed").open("wb") as file:
        matrix.write_file(ctx, file.fileno(), 0)
    found = hashlib.sha256((tmp_path / "packed").read_bytes()).hexdigest()[:16]
    assert (packed_cache.LAYOUT, found) == (3, PACKED_BYTES[dtype, group_len])


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


def flip(path: Path, place: int) -> bytes:
    """Another bit in the file; what it was before."""
    before = path.read_bytes()
    content = bytearray(before)
    content[place] ^= 1 << 5
    path.write_bytes(content)
    return before


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_bit_that_has_changed_is_found(directory, tmp_path, caplog, quantization):
    """Wherever it is: the entry is made again, and one line says why."""
    cache = tmp_path / "cache"
    expected = logits(directory, cache, quantization=quantization)
    (matrices,), (small,) = cache.glob("*.bin"), cache.glob("*.safetensors")
    size = small.stat().st_size
    header = 8 + int.from_bytes(small.read_bytes()[:8], "little")
    places = [(matrices, place) for place in (0, 5000, -1)]
    places += [(small, place) for place in (0, 9, header // 2, header, (header + size) // 2, -1)]
    for path, place in places:
        before = flip(path, place)
        caplog.clear()
        assert torch.equal(logits(directory, cache, quantization=quantization), expected)
        (record,) = caplog.records
        assert "are broken and are made again" in record.getMessage() and str(path) in record.getMessage()
        assert path.read_bytes() == before


def test_of_what_is_mapped_only_what_is_small_is_checked(directory, tmp_path, caplog):
    """To look at the matrices would be to read what mapping leaves in its file."""
    cache = tmp_path / "cache"
    expected = logits(directory, cache)
    (matrices,), (small,) = cache.glob("*.bin"), cache.glob("*.safetensors")
    before = flip(small, -1)
    assert torch.equal(logits(directory, cache, map_packed_cache=True), expected)
    assert len(caplog.records) == 1 and small.read_bytes() == before
    flip(matrices, 1)
    assert not torch.equal(logits(directory, cache, map_packed_cache=True), expected)
    assert torch.equal(logits(directory, cache), expected)
    assert len(caplog.records) == 2


def test_matrices_that_cannot_be_read_are_made_again(directory, tmp_path, monkeypatch, caplog):
    """A disk may fail in the middle of them."""
    cache = tmp_path / "cache"
    expected = logits(directory, cache)
    (matrices,) = cache.glob("*.bin")
    before, checked = matrices.read_bytes(), PackedCache._checked

    def cut(*args):
        small = checked(*args)
        matrices.write_bytes(before[:-5000])
        return small

    with monkeypatch.context() as patch:
        patch.setattr(PackedCache, "_checked", cut)
        assert torch.equal(logits(directory, cache), expected)
    assert "it ends before the packed weights do" in caplog.text and matrices.read_bytes() == before


OLD_S = packed_cache.UNUSED_S + 3600


def age(path: Path) -> None:
    then_s = path.stat().st_mtime - OLD_S
    os.utime(path, (then_s, then_s))


def test_entries_that_nobody_reads_are_removed_when_one_is_made(directory, tmp_path):
    cache, key, layout = tmp_path / "cache", "0123456789abcdef" * 2, packed_cache.LAYOUT
    cache.mkdir()
    kept = [f"{layout}-{key}.bin", f"{layout + 1}-{key}.safetensors", "notes.bin", f"x{key}.bin"]
    gone = [f"{key}.bin", f"{key}.safetensors", f"{layout - 1}-{key}.bin", f"{layout}-f{key[1:]}.safetensors"]
    for name in (*kept, *gone):
        (cache / name).write_bytes(b"x")
    for name in (gone[-1], "notes.bin"):
        age(cache / name)
    logits(directory, cache)
    found = {path.name for path in cache.iterdir()}
    assert set(kept) < found and not found.intersection(gone) and len(found) == len(kept) + 2


def test_an_entry_that_is_read_stays(directory, tmp_path, no_checkpoint):
    cache = tmp_path / "cache"
    expected = logits(directory, cache)
    for path in cache.iterdir():
        age(path)
    logits(directory, cache)
    logits(directory, cache, quantization="int8")
    assert len(list(cache.iterdir())) == 4
    no_checkpoint()
    assert torch.equal(logits(directory, cache), expected)


def test_a_file_of_another_make_is_made_again(directory, tmp_path, caplog):
    cache = tmp_path / "cache"
    expected = logits(directory, cache, quantization="int8")
    (path,) = cache.glob("*.safetensors")
    small = load_file(path)
    for name in ("order.0", "columns.1"):
        save_file({other: tensor for other, tensor in small.items() if other != name}, path)
        assert torch.equal(logits(directory, cache, quantization="int8"), expected)
        assert load_file(path).keys() == small.keys()
    assert caplog.text.count("are broken and are made again") == 2


def test_a_full_disk_costs_only_a_warning(directory, tmp_path, caplog):
    cache = tmp_path / "cache"
    expected = logits(directory, None)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        assert torch.equal(logits(directory, cache), expected)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "packed weights cannot be kept" in caplog.text and "MB are free there" in caplog.text
    assert not list(cache.iterdir())
    assert torch.equal(logits(directory, cache), expected)
    assert len(list(cache.iterdir())) == 2


def test_two_servers_write_at_once(directory, tmp_path, monkeypatch, caplog, no_checkpoint):
    """In two containers they may even have the same process id."""
    cache = tmp_path / "cache"
    seen: list[torch.Tensor] = []

    def save_beside(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if not seen:
            seen.append(torch.empty(0))
            seen.append(logits(directory, cache))  # begins and ends while this one writes
        save_file(tensors, path)

    monkeypatch.setattr(packed_cache, "save_file", save_beside)
    expected = logits(directory, cache)
    assert len(list(cache.iterdir())) == 2 and not caplog.records
    no_checkpoint()
    assert torch.equal(seen[1], expected) and torch.equal(logits(directory, cache), expected)


def test_what_killed_writers_left_is_removed(directory, tmp_path):
    cache = tmp_path / "cache"
    for name in ("left.tmp", "held.tmp"):
        (cache / name).mkdir(parents=True)
        (cache / name / "part.bin").write_bytes(b"x")
    holder = os.open(cache / "held.tmp", os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        logits(directory, cache)
    finally:
        os.close(holder)
    assert [path.name for path in cache.glob("*.tmp")] == ["held.tmp"]


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
