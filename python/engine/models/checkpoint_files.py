"""The safetensors files of a checkpoint, and what their headers say. No torch here."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from engine.errors import CheckpointError, ConfigError
from engine.models.hf_config import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def checkpoint_files(directory: Path) -> list[Path]:
    """In the order of their names.

    Raises: `CheckpointError` when there are none, one is absent, or the index names a file
    outside the directory.
    """
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.exists():
        return [single]
    if not index.exists():
        pickled = next(directory.glob("pytorch_model*.bin"), None)
        why = f"; {pickled.name} is a pickle, which is never loaded" if pickled else ""
        raise CheckpointError(f"no {SINGLE_FILE} or {INDEX_FILE} in {directory}{why}")
    try:
        weight_map = read_json(index).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(error.message) from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX_FILE} has no weight_map")
    names = set(map(str, weight_map.values()))
    for name in sorted(names):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{INDEX_FILE} names {name!r:.80}, which is no safetensors file beside it")
        if not (directory / name).is_file():
            raise CheckpointError(f"{INDEX_FILE} names {name}, which does not exist")
    return [directory / name for name in sorted(names)]


def stored_tensors(directory: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype, as the format calls it, and shape of every tensor.

    Raises: `CheckpointError` as `checkpoint_files`.
    """
    return {name: (dtype, shape) for name, dtype, shape, _ in _headers(directory)}


def usual_dtype(directory: Path) -> str | None:
    """In which of the float types, as torch calls it, most of a checkpoint is stored; None if there is none.

    Raises: `CheckpointError` for broken files.
    """
    num_bytes: Counter[str] = Counter()
    for _, dtype, _, size in _headers(directory):
        if dtype in _DTYPES:
            num_bytes[_DTYPES[dtype]] += size
    return max(num_bytes, key=lambda dtype: num_bytes[dtype], default=None)


def _headers(directory: Path) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """Name, dtype, shape and bytes of every tensor."""
    for path in checkpoint_files(directory):
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                entries = json.loads(file.read(length)) if length <= MAX_HEADER_BYTES else {}
            for name, entry in entries.items():
                if name != "__metadata__":
                    start, end = entry["data_offsets"]
                    yield name, str(entry["dtype"]), tuple(map(int, entry["shape"])), int(end) - int(start)
        except (OSError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
            raise CheckpointError(f"{path.name} is broken or truncated") from None
