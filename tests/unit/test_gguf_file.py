"""Reading GGUF files: what they say, and one clear line for whatever is broken, cut off or mislabelled."""

from __future__ import annotations

import random
import struct

import gguf
import numpy as np
import pytest

from engine.config.model_location import check_model_path
from engine.errors import CheckpointError, ConfigError
from engine.gguf_file import GGUFFile
from engine.models.registry import read_spec
from engine.text.tokenizer import Tokenizer
from helpers.gguf_files import add_tokenizer, add_value

METADATA = {
    "llama.context_length": 512,
    "llama.embedding_length": 128,
    "llama.block_count": 1,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}


def write(path, *, metadata=METADATA, tensors=None, has_tokenizer=True, arch="llama", **changes):
    """A file whose tensors are too few for a model, but enough to read its facts."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in {**metadata, **changes}.items():
        if value is not None:
            add_value(writer, key, value)
    if has_tokenizer:
        add_tokenizer(writer, None)
    for name, values in (tensors or {"token_embd.weight": np.ones((16, 128), np.float32)}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "model.gguf")


def refusal(path, read=GGUFFile) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(path)
    message = caught.value.message
    assert "\n" not in message and message.startswith(f"{path.name}: "), message
    return message


def test_reads_what_the_package_wrote(tmp_path):
    values = {"a": np.arange(96, dtype=np.float32).reshape(2, 48), "b": np.ones((3, 2, 5), np.float16)}
    kinds = {
        "x.int": 3,
        "x.float": 0.5,
        "x.flag": True,
        "x.text": "é",
        "x.list": [1, 2],
        "x.words": ["a", ""],
    }
    path = write(tmp_path / "m.gguf", tensors=values, metadata=kinds, has_tokenizer=False)
    file = GGUFFile(path)
    assert {key: file.metadata[key] for key in kinds} == kinds
    assert file.architecture == "llama"
    for name, expected in values.items():
        info = file.tensors[name]
        assert info.shape == expected.shape
        assert file.read(info).tobytes() == expected.tobytes()


def test_facts_of_a_model(path):
    spec = read_spec(path)
    assert (spec.architecture, spec.hidden_size, spec.head_dim, spec.vocab_size) == (
        "LlamaForCausalLM",
        128,
        64,
        16,
    )
    assert (spec.dtype, spec.tie_word_embeddings, spec.max_position_embeddings) == ("float32", True, 512)
    assert check_model_path(str(path)) == path.resolve()


def test_every_truncation_is_refused(path):
    whole = path.read_bytes()
    for length in [*range(600), *range(600, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        refusal(path)


def test_changed_bytes_never_do_more_than_be_refused(path):
    """Whatever stands in the header: an error of ours, or a file that reads."""
    whole = path.read_bytes()
    generator = random.Random(0)
    num_read = 0
    for _ in range(600):
        data = bytearray(whole)
        for _ in range(generator.choice((1, 1, 2, 8))):
            data[generator.randrange(len(data) - 16 * 128 * 4)] = generator.choice((0, 1, 127, 255, 9, 8))
        path.write_bytes(data)
        for read in (read_spec, Tokenizer.from_checkpoint):
            try:
                read(path)
                num_read += 1
            except ConfigError as error:
                assert "\n" not in error.message
    assert 0 < num_read < 1200


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot mmap an empty file"),
        (b"GG", "is no GGUF file"),
        (struct.pack("<Q", 64) + b"{}" * 32, "is no GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is no GGUF file"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(64), "is version 1; versions 2 and 3 are supported"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(64), "is big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "is broken or truncated"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "is broken or truncated"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63) + bytes(64), "is broken or truncated"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 8, 2**50), "is broken or truncated"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 9, 1) + bytes(64), "unknown kind 9"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 77) + bytes(64), "unknown kind 77"),
    ],
)
def test_foreign_content_is_refused(tmp_path, content, message):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    assert message in refusal(path)


def tensor_header(name: bytes, shape, kind: int, offset: int) -> bytes:
    numbers = struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, offset)
    return struct.pack("<Q", len(name)) + name + numbers


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([(b"a", (4, 32), 0, 0), (b"a", (4, 32), 0, 0)], "has tensor 'a' twice"),
        ([(b"a", (4, 33), 8, 0)], "of shape [4, 33], which Q8_0 cannot be"),
        ([(b"a", (0, 32), 0, 0)], "of shape [0, 32]"),
        ([(b"a", (4, 32), 0, 3)], "at an offset that is not aligned"),
        ([(b"a", (4, 32), 20, 0)], "of type 20, which is not supported; supported: F32, F16"),
        ([(b"a", (2**40, 2**40), 0, 0)], "is truncated: tensor 'a' ends behind the end"),
        ([(b"a", (4, 32), 0, 2**62)], "is truncated: tensor 'a' ends behind the end"),
        ([(b"a", (1,) * 5, 0, 0)], "of 5 dimensions"),
        ([(b"a", (), 0, 0)], "of 0 dimensions"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, tensors, message):
    path = tmp_path / "x.gguf"
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 0)
    path.write_bytes(head + b"".join(tensor_header(*tensor) for tensor in tensors) + bytes(1024))
    assert message in refusal(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llama.embedding_length": None}, "lacks llama.embedding_length"),
        ({"llama.block_count": None}, "lacks llama.block_count"),
        ({"llama.attention.head_count": 0}, "has 0 for attention.head_count"),
        ({"llama.feed_forward_length": [1, 2]}, "has a list for llama.feed_forward_length"),
        ({"llama.context_length": "long"}, "max_position_embeddings must be an integer"),
        ({"llama.attention.head_count_kv": 3}, "2 query heads do not divide"),
        (
            {"llama.attention.key_length": 40, "llama.rope.dimension_count": 40},
            "head_dim 40 is not supported",
        ),
        ({"general.alignment": 24}, "general.alignment 24"),
    ],
)
def test_wrong_facts_are_named(tmp_path, change, message):
    assert message in refusal(write(tmp_path / "m.gguf", **change), read_spec)


def test_paths(tmp_path, path):
    (tmp_path / "only").mkdir()
    path.rename(tmp_path / "only" / "model.gguf")
    with pytest.raises(ConfigError, match="has no config.json; of GGUF give the file: .*model.gguf"):
        check_model_path(str(tmp_path / "only"))
    with pytest.raises(ConfigError, match="no such model directory"):
        check_model_path(str(tmp_path / "none" / "model.gguf"))
    (tmp_path / "model.bin").write_text("")
    with pytest.raises(ConfigError, match="takes a directory, a GGUF file or a hub id"):
        check_model_path(str(tmp_path / "model.bin"))
    assert "No such file" in refusal(tmp_path / "none.gguf")
