"""Loading: everything in its slot, and every kind of broken checkpoint named in one line."""

from __future__ import annotations

import functools
import io
import json
import sys

import pytest
import torch
from safetensors.torch import save_file

from engine.errors import CheckpointError
from engine.models import weights
from engine.models.checkpoint_files import INDEX_FILE, SINGLE_FILE, stored_tensors, usual_dtype
from engine.models.weights import Slot, load_checkpoint, load_dummy

SHAPES = {"a.weight": (3, 4), "b.weight": (5,), "c.weight": (2, 2)}


class Store:
    """Slots that keep what they are given."""

    def __init__(self, shapes=SHAPES):
        self.tensors = {}
        self.slots = {name: Slot(shape, self._keep(name)) for name, shape in shapes.items()}

    def _keep(self, name):
        def keep(tensor):
            assert name not in self.tensors
            self.tensors[name] = tensor.clone()

        return keep


def make_tensors(shapes=SHAPES):
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_shards(directory, tensors, assignment):
    for file_name in set(assignment.values()):
        part = {name: tensors[name] for name, shard in assignment.items() if shard == file_name}
        save_file(part, directory / file_name)
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": assignment}))


def refusal(directory, store=None, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(directory, (store or Store()).slots, **options)
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_single_file(tmp_path, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in make_tensors().items()}
    save_file(tensors, tmp_path / SINGLE_FILE)
    store, told = Store(), []
    load_checkpoint(tmp_path, store.slots, progress=lambda stage, fraction: told.append((stage, fraction)))
    assert store.tensors.keys() == tensors.keys()
    assert all(torch.equal(store.tensors[name], tensor) for name, tensor in tensors.items())
    fractions = [fraction for _, fraction in told]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0


def test_a_terminal_is_shown_a_progress_bar(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(weights, "tqdm", functools.partial(weights.tqdm, mininterval=0, miniters=1))
    save_file(make_tensors(), tmp_path / SINGLE_FILE)
    load_checkpoint(tmp_path, Store().slots)
    assert "loading weights" in terminal.getvalue() and "100%" in terminal.getvalue()


def test_shards(tmp_path):
    tensors = make_tensors()
    write_shards(tmp_path, tensors, dict(zip(tensors, ["x.safetensors", "y.safetensors"] * 2, strict=False)))
    store = Store()
    load_checkpoint(tmp_path, store.slots)
    assert all(torch.equal(store.tensors[name], tensor) for name, tensor in tensors.items())


def test_missing_tensors_are_named(tmp_path):
    tensors = make_tensors()
    del tensors["b.weight"]
    save_file(tensors, tmp_path / SINGLE_FILE)
    assert refusal(tmp_path) == "the checkpoint lacks b.weight"


def test_left_over_tensors_are_named_unless_ignored(tmp_path):
    save_file({**make_tensors(), "extra.weight": torch.zeros(1)}, tmp_path / SINGLE_FILE)
    assert "extra.weight" in refusal(tmp_path)
    load_checkpoint(tmp_path, Store().slots, is_ignored=lambda name: name == "extra.weight")


def test_long_lists_are_cut(tmp_path):
    save_file({"only": torch.zeros(1)}, tmp_path / SINGLE_FILE)
    shapes = {f"t{index}": (1,) for index in range(12)} | {"only": (1,)}
    assert refusal(tmp_path, Store(shapes)).endswith("t0, t1, t2, t3, t4 and 7 more")


def test_wrong_shape_is_named(tmp_path):
    save_file({**make_tensors(), "c.weight": torch.zeros(4)}, tmp_path / SINGLE_FILE)
    assert refusal(tmp_path) == "tensor c.weight has shape [4], expected [2, 2]"


def test_wrong_dtype_is_named(tmp_path):
    save_file({**make_tensors(), "c.weight": torch.zeros(2, 2, dtype=torch.int8)}, tmp_path / SINGLE_FILE)
    assert "tensor c.weight is I8" in refusal(tmp_path)


def test_nothing_is_stored_from_a_checkpoint_that_does_not_fit(tmp_path):
    save_file({**make_tensors(), "extra.weight": torch.zeros(1)}, tmp_path / SINGLE_FILE)
    store = Store()
    refusal(tmp_path, store)
    assert store.tensors == {}


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    tensors = make_tensors()
    save_file(tensors, tmp_path / "x.safetensors")
    save_file({"a.weight": tensors["a.weight"]}, tmp_path / "y.safetensors")
    weight_map = {**dict.fromkeys(tensors, "x.safetensors"), "again": "y.safetensors"}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    assert refusal(tmp_path) == "tensor a.weight is both in x.safetensors and in y.safetensors"


def test_no_checkpoint(tmp_path):
    assert "no model.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{" * 50_000])
def test_broken_index(tmp_path, index):
    (tmp_path / INDEX_FILE).write_text(index)
    assert INDEX_FILE in refusal(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/x.safetensors",
        "sub/x.safetensors",
        "..",
        "",
        "x.bin",
        "x.safetensors/",
        "a\0.safetensors",
    ],
)
def test_index_cannot_leave_the_directory(tmp_path, name):
    inside = tmp_path / "model"
    (inside / "sub").mkdir(parents=True)
    for place in (tmp_path, inside / "sub"):
        save_file(make_tensors(), place / "x.safetensors")
    (inside / INDEX_FILE).write_text(json.dumps({"weight_map": dict.fromkeys(SHAPES, name)}))
    assert INDEX_FILE in refusal(inside)


def test_absent_shard_is_named(tmp_path):
    write_shards(tmp_path, make_tensors(), dict.fromkeys(SHAPES, "x.safetensors"))
    (tmp_path / "x.safetensors").unlink()
    assert refusal(tmp_path).endswith("names x.safetensors, which does not exist")


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / SINGLE_FILE
    save_file(make_tensors(), path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert SINGLE_FILE in refusal(tmp_path)


@pytest.mark.parametrize(
    "content", [b"\xff" * 64, b"version https://git-lfs.github.com/spec/v1\n", b"\0" * 8]
)
def test_foreign_content_is_refused(tmp_path, content):
    (tmp_path / SINGLE_FILE).write_bytes(content)
    assert SINGLE_FILE in refusal(tmp_path)


@pytest.mark.parametrize("read", [stored_tensors, usual_dtype])
@pytest.mark.parametrize(
    "header",
    [
        '{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, Infinity]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        '{"a": {"dtype": "F32", "shape": 4, "data_offsets": [0, 4]}}',
        '{"a": {"shape": [1], "data_offsets": [0, 4]}}',
        '{"a": []}',
        "[]",
        "[" * 100_000,
    ],
)
def test_what_a_header_says_wrongly_is_refused(tmp_path, header, read):
    (tmp_path / SINGLE_FILE).write_bytes(len(header).to_bytes(8, "little") + header.encode())
    with pytest.raises(CheckpointError, match="^model.safetensors is broken or truncated$"):
        read(tmp_path)


def test_dummy_weights_repeat_and_differ():
    shapes = {"a": (1000, 3000), "b": (2000, 1500), "norm": (8,), "bias": (8,)}
    first, second, other = Store(shapes), Store(shapes), Store(shapes)
    for store, seed in ((first, 0), (second, 0), (other, 1)):
        store.slots["norm"] = Slot((8,), store.slots["norm"].store, dummy="ones")
        store.slots["bias"] = Slot((8,), store.slots["bias"].store, dummy="zeros")
        load_dummy(store.slots, seed=seed)
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in shapes)
    assert not torch.equal(first.tensors["a"], other.tensors["a"])
    assert not torch.equal(first.tensors["a"].flatten(), first.tensors["b"].flatten())
    assert (first.tensors["norm"] == 1).all() and (first.tensors["bias"] == 0).all()
    assert 0.01 < float(first.tensors["a"].float().std()) < 0.03


def test_files_are_closed_now_and_then(tmp_path, monkeypatch):
    """What a file has been read of counts as memory until it is closed."""
    tensors = make_tensors()
    save_file(tensors, tmp_path / SINGLE_FILE)
    opened, really_open = [], weights._open
    monkeypatch.setattr(weights, "BATCH_ELEMENTS", 9)
    monkeypatch.setattr(weights, "_open", lambda path: opened.append(path) or really_open(path))
    store = Store()
    load_checkpoint(tmp_path, store.slots)
    assert store.tensors.keys() == tensors.keys()
    assert len(opened) == 1 + 2, "the header, then 12 elements, then 5 and 4"
