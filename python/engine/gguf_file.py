"""Read GGUF files, trusting nothing in them. No torch here.

The reader of the `gguf` package takes seconds for a vocabulary of 150,000 and walks on past the end of a
truncated file; this one checks every length against the file.
Source: the GGUF specification, ggml/docs/gguf.md.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.errors import CheckpointError

SUFFIX = ".gguf"

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_MAX_PARTS = 1000
_PART = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class TensorType(NamedTuple):
    """How a tensor is stored: `block_bytes` for each `block_len` numbers of a row."""

    name: str
    block_len: int
    block_bytes: int


_TYPES: Mapping[int, TensorType] = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    10: TensorType("Q2_K", 256, 84),
    11: TensorType("Q3_K", 256, 110),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    30: TensorType("BF16", 1, 2),
}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is. `shape` is that of rows and columns, the last dimension being contiguous."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) // self.type.block_len * self.type.block_bytes

    def part(self, index: int) -> TensorInfo:
        """One of the tensors that are stacked in this one."""
        part = dataclasses.replace(self, shape=self.shape[1:])
        return dataclasses.replace(part, offset=self.offset + index * part.num_bytes)


class GGUFFile:
    """The metadata and the list of tensors of one file, or of one in parts that is given by its first; `read`
    maps the data of a tensor.

    `metadata` values are numbers, booleans, strings, and lists of one kind of these.
    Raises: `CheckpointError`, one line that names the file, for whatever is not as it should be.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metadata, self.tensors = self._load(self.path)
        self.paths = _parts_of(self)
        """Of all parts, in order."""
        self._part_of = dict.fromkeys(self.tensors, self.path)
        for number, part in enumerate(self.paths[1:], 1):
            metadata, tensors = self._load(part)
            if (metadata.get("split.no"), metadata.get("split.count")) != (number, len(self.paths)):
                raise self.error(f"has {part.name} beside it, which is not part {number + 1} of it")
            if twice := tensors.keys() & self.tensors.keys():
                raise self.error(f"has tensor {min(twice)!r:.80} twice, again in {part.name}")
            self.tensors |= tensors
            self._part_of |= dict.fromkeys(tensors, part)
        expected = self.metadata.get("split.tensors.count")
        if len(self.paths) > 1 and expected != len(self.tensors):
            raise self.error(f"has {len(self.tensors)} tensors in its parts, not {expected!r:.20}")

    def _load(self, path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(data)
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise CheckpointError(f"{path.name}: {' '.join(str(error).split())[:200]}") from None

    @property
    def architecture(self) -> str:
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str):
            raise self.error("does not name its general.architecture")
        return name

    def read(self, info: TensorInfo) -> np.ndarray:
        """The bytes of a tensor, uint8. They are mapped as long as the array lives, and may be written to."""
        start = info.offset - info.offset % mmap.ALLOCATIONGRANULARITY
        skipped = info.offset - start
        with self._part_of[info.name].open("rb") as file:
            try:
                data = mmap.mmap(
                    file.fileno(), skipped + info.num_bytes, access=mmap.ACCESS_COPY, offset=start
                )
            except (OSError, ValueError):
                raise self.error(f"was changed while tensor {info.name} was read") from None
        return np.frombuffer(data, np.uint8, info.num_bytes, skipped)

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path.name}: {what}")


def _parts_of(file: GGUFFile) -> tuple[Path, ...]:
    """The files that llama.cpp's splitter makes are called NAME-00001-of-00003.gguf."""
    count = file.metadata.get("split.count", 1)
    if count in (0, 1):
        return (file.path,)
    match = _PART.fullmatch(file.path.name)
    if match is None or int(match[2]) != count or count > _MAX_PARTS:
        raise file.error(f"is one of {count!r:.20} parts, but not called so (NAME-00001-of-00003.gguf)")
    paths = [file.path.with_name(f"{match[1]}-{n:05}-of-{count:05}{SUFFIX}") for n in range(1, count + 1)]
    if file.metadata.get("split.no") != 0 or file.path != paths[0]:
        raise file.error(f"is not the first of its parts; give {paths[0].name}")
    if missing := [path.name for path in paths if not path.is_file()]:
        raise file.error(f"lacks its part {missing[0]}")
    return tuple(paths)


def is_gguf(path: str | Path) -> bool:
    """Whether a path is to be read as a GGUF file, by its name."""
    return str(path).lower().endswith(SUFFIX)


class _Cursor:
    """Reads values one after the other. Raises: `ValueError` where the file ends too early."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def scalars(self, code: str, count: int = 1) -> tuple[Any, ...]:
        start = self.at
        self.skip(struct.calcsize(code) * count)
        return struct.unpack_from(f"<{count}{code}", self.data, start)

    def scalar(self, code: str) -> Any:
        return self.scalars(code)[0]

    def skip(self, num_bytes: int) -> None:
        if num_bytes > len(self.data) - self.at:
            raise ValueError("is broken or truncated")
        self.at += num_bytes

    def string(self) -> str:
        length = self.scalar("Q")
        start = self.at
        self.skip(length)
        return self.data[start : self.at].decode("utf-8", "replace")

    def value(self) -> Any:
        kind = self.scalar("I")
        if kind != _ARRAY:
            return self._values(kind, 1)[0]
        kind, count = self.scalars("I")[0], self.scalar("Q")
        return self._values(kind, count)

    def _values(self, kind: int, count: int) -> list[Any]:
        if kind == _STRING:
            if count > (len(self.data) - self.at) // 8:  # each has at least a length
                raise ValueError("is broken or truncated")
            return [self.string() for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"has metadata of the unknown kind {kind}")
        return list(self.scalars(_SCALARS[kind], count))


def _parse(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    cursor = _Cursor(data)
    if data[:4] != _MAGIC:
        raise ValueError("is no GGUF file")
    cursor.skip(4)
    version = cursor.scalar("I")
    if version not in _VERSIONS:
        what = "is big-endian" if version & 0xFFFF == 0 and version else f"is version {version}"
        raise ValueError(f"{what}; versions 2 and 3 are supported, little-endian")
    num_tensors, num_entries = cursor.scalars("Q", 2)
    metadata: dict[str, Any] = {}
    for _ in range(num_entries):
        key = cursor.string()
        if key in metadata:
            raise ValueError(f"has {key!r:.80} twice")
        metadata[key] = cursor.value()
    return metadata, dict(_tensors(cursor, num_tensors, metadata))


def _tensors(cursor: _Cursor, count: int, metadata: Mapping[str, Any]) -> Iterator[tuple[str, TensorInfo]]:
    infos = [_tensor(cursor) for _ in range(count)]
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        raise ValueError(f"has general.alignment {alignment!r:.80}, which is no power of two from 8 on")
    start = -(-cursor.at // alignment) * alignment
    seen = set()
    for info in infos:
        if info.name in seen:
            raise ValueError(f"has tensor {info.name!r:.80} twice")
        seen.add(info.name)
        if info.offset % alignment:
            raise ValueError(f"has tensor {info.name!r:.80} at an offset that is not aligned")
        if start + info.offset + info.num_bytes > len(cursor.data):
            raise ValueError(f"is truncated: tensor {info.name!r:.80} ends behind the end of the file")
        yield info.name, dataclasses.replace(info, offset=start + info.offset)


def _tensor(cursor: _Cursor) -> TensorInfo:
    """A tensor whose offset still counts from the start of the data."""
    name, num_dimensions = cursor.string(), cursor.scalar("I")
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise ValueError(f"has tensor {name!r:.80} of {num_dimensions} dimensions")
    shape = tuple(reversed(cursor.scalars("Q", num_dimensions)))
    kind, offset = cursor.scalar("I"), cursor.scalar("Q")
    if kind not in _TYPES:
        known = ", ".join(known.name for known in _TYPES.values())
        raise ValueError(
            f"has tensor {name!r:.80} of type {kind}, which is not supported; supported: {known}"
        )
    if 0 in shape or shape[-1] % _TYPES[kind].block_len:
        raise ValueError(
            f"has tensor {name!r:.80} of shape {list(shape)}, which {_TYPES[kind].name} cannot be"
        )
    return TensorInfo(name, shape, _TYPES[kind], offset)
