"""Fill a model from safetensors files, tensor by tensor, and accept nothing that does not fit."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from engine.errors import CheckpointError
from engine.models.checkpoint_files import checkpoint_files

Progress = Callable[[str, float], None]

FLOATS = ("F32", "F16", "BF16")
NAMES_SHOWN = 5
BATCH_ELEMENTS = 32 << 20
DUMMY_SCALE = 0.02
DUMMY_POOL = 4_194_301  # a prime, so that rows of a repeated pool never line up


@dataclasses.dataclass(frozen=True)
class Slot:
    """The place of one checkpoint tensor: its exact shape, and what takes it.

    `dummy` is how it is invented when there is no checkpoint: "normal", "ones" or "zeros". `matrix` is
    the packed matrix that it becomes a part of, None for what is stored as it is. `dtypes` are names of
    the safetensors format.
    """

    shape: tuple[int, ...]
    store: Callable[[torch.Tensor], None]
    dummy: str = "normal"
    matrix: Any = None
    dtypes: tuple[str, ...] = FLOATS


def load_checkpoint(
    directory: str | Path,
    slots: Mapping[str, Slot],
    *,
    is_ignored: Callable[[str], bool] = lambda name: False,
    progress: Progress | None = None,
) -> None:
    """Store every tensor of the checkpoint in its slot.

    Names and shapes are checked from the file headers before any data is read. Peak memory is that of
    the model and a tensor or a batch of them: what was read stays mapped until its file is closed.
    Raises: `CheckpointError` that names the tensor or the file at fault.
    """
    shards = checkpoint_files(Path(directory))
    headers = [_read_header(path) for path in shards]
    _check_names(headers, shards, slots, is_ignored)
    total = sum(math.prod(slot.shape) for slot in slots.values())
    with progress_bar(total, progress) as advance:
        for path, header in zip(shards, headers, strict=True):
            for names in _batches([name for name in header if name in slots], slots):
                with _open(path) as file:
                    for name in names:
                        slots[name].store(_read_tensor(file, path, name))
                        advance(math.prod(slots[name].shape))


def tensor_names(directory: str | Path) -> frozenset[str]:
    """The names of all tensors of a checkpoint. Raises: `CheckpointError` as `load_checkpoint`."""
    return frozenset(tensor_dtypes(directory))


def tensor_dtypes(directory: str | Path) -> dict[str, str]:
    """The dtype of every tensor by its name. Raises: `CheckpointError` as `load_checkpoint`."""
    headers = [_read_header(path) for path in checkpoint_files(Path(directory))]
    return {name: dtype for header in headers for name, (_, dtype) in header.items()}


def _batches(names: list[str], slots: Mapping[str, Slot]) -> Iterator[list[str]]:
    """Names of neighbours in a file, up to BATCH_ELEMENTS or one tensor at a time."""
    batch: list[str] = []
    size = 0
    for name in names:
        count = math.prod(slots[name].shape)
        if batch and size + count > BATCH_ELEMENTS:
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += count
    if batch:
        yield batch


def read_one_tensor(directory: str | Path, name: str) -> torch.Tensor | None:
    """A tensor of the checkpoint, None if it has none of that name. Raises: `CheckpointError`."""
    for path in checkpoint_files(Path(directory)):
        with _open(path) as file:
            if name in file.keys():  # noqa: SIM118 (not a dict)
                return _read_tensor(file, path, name)
    return None


def load_dummy(slots: Mapping[str, Slot], *, seed: int = 0, progress: Progress | None = None) -> None:
    """Store invented weights, the same for the same seed, at the speed of a memory copy."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(DUMMY_POOL, generator=generator).mul_(DUMMY_SCALE).bfloat16()
    offset = 0
    with progress_bar(sum(math.prod(slot.shape) for slot in slots.values()), progress) as advance:
        for slot in slots.values():
            count = math.prod(slot.shape)
            if slot.dummy == "normal":
                repeats = -(-(offset + count) // DUMMY_POOL)
                slot.store(pool.repeat(repeats)[offset : offset + count].view(slot.shape))
                offset = (offset + count) % DUMMY_POOL
            else:
                slot.store(torch.full(slot.shape, float(slot.dummy == "ones")))
            advance(count)


def _read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor of one file."""
    header = {}
    with _open(path) as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            entry = file.get_slice(name)
            header[name] = tuple(entry.get_shape()), entry.get_dtype()
    return header


def _check_names(
    headers: list[dict[str, tuple[tuple[int, ...], str]]],
    shards: list[Path],
    slots: Mapping[str, Slot],
    is_ignored: Callable[[str], bool],
) -> None:
    seen: dict[str, Path] = {}
    left_over: list[str] = []
    for path, header in zip(shards, headers, strict=True):
        for name, (shape, dtype) in header.items():
            if name not in slots:
                if not is_ignored(name):
                    left_over.append(name)
                continue
            if name in seen:
                raise CheckpointError(f"tensor {name} is both in {seen[name].name} and in {path.name}")
            seen[name] = path
            if shape != slots[name].shape:
                expected = list(slots[name].shape)
                raise CheckpointError(f"tensor {name} has shape {list(shape)}, expected {expected}")
            if dtype not in slots[name].dtypes:
                expected = ", ".join(slots[name].dtypes)
                raise CheckpointError(f"tensor {name} is {dtype}, expected one of {expected}")
    missing = [name for name in slots if name not in seen]
    if missing:
        raise CheckpointError(f"the checkpoint lacks {_listed(missing)}")
    if left_over:
        raise CheckpointError(
            f"the checkpoint has tensors that this architecture does not: {_listed(left_over)}"
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path.name} is broken or truncated: {reason}") from None


def _read_tensor(file: safe_open, path: Path, name: str) -> torch.Tensor:
    try:
        return file.get_tensor(name)
    except (SafetensorError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"cannot read tensor {name} of {path.name}: {reason}") from None


@contextlib.contextmanager
def progress_bar(total: int, progress: Progress | None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal's stderr; `progress` is told the fraction each time it has grown by a hundredth."""
    stage = "loading weights"
    done, told = 0, 0.0
    bar = tqdm(
        total=total, desc=stage, unit="param", unit_scale=True, file=sys.stderr, leave=False, disable=None
    )

    def advance(count: int) -> None:
        nonlocal done, told
        done += count
        bar.update(count)
        if progress is not None and (done == total or done / total - told >= 0.01):
            told = done / total
            progress(stage, told)

    with bar:
        yield advance
