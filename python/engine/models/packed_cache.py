"""Packed weights kept in a directory, so that the next start neither converts nor quantizes them again."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from engine.errors import CheckpointError, ConfigError, NativeError
from engine.gguf_file import GGUFFile, is_gguf
from engine.models.any_model import AnySpec
from engine.models.checkpoint_files import checkpoint_files
from engine.models.weights import Slot

log = logging.getLogger(__name__)

LAYOUT = 3
"""Changes whenever the same weights are packed into other bytes, or kept in another form."""

ALIGNMENT = 4096
"""Matrices begin at a page, so that they can be mapped."""

SAMPLES, SAMPLE_BYTES = 256, 4096
"""How much of a file counts: pieces at equal distances, from its first bytes to its last."""

UNUSED_S = 30 * 24 * 3600
"""Entries that no start has read for so long are removed when another one is made."""

_UNFINISHED = ".tmp"
_ENTRY = re.compile(r"(?:(\d+)-)?[0-9a-f]{32}\.(?:bin|safetensors)")
"""Names of files that this module has written, and the layout they have; the first ones did not say."""
_SUMS, _SUM = "sums", "sum"
"""Names of tensors: int64 [matrices], sums of their bytes, and int64 [1], that of all other small ones."""


class PackedCache:
    """Two files for each model and format: `LAYOUT-KEY.bin`, the matrices one after the other, and
    `LAYOUT-KEY.safetensors`, everything small, written last. The key is a hash of what the bytes depend on:
    names, sizes, times and samples of the checkpoint's files, the facts of the model, and the format.
    Samples, because images and archives give all files one time, and models of one shape have one size.

    What is read is held against sums; of matrices that are mapped nothing is read, and nothing checked.

    Raises: `ConfigError` when the directory cannot be made.
    """

    def __init__(self, directory: str | Path, key: str, *, is_mapped: bool = False) -> None:
        self._directory, self._is_mapped = Path(directory), is_mapped
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--packed-cache {directory}: {error.strerror}") from None
        self._matrices = self._directory / f"{LAYOUT}-{key}.bin"
        self._small = self._directory / f"{LAYOUT}-{key}.safetensors"

    def load(self, ctx: Any, slots: Mapping[str, Slot]) -> bool:
        """Fill the slots, if there is what fits them; all threads of `ctx` read. Else they are empty, and the
        log says why.

        Raises: `CheckpointError` when the matrices cannot be mapped.
        """
        placed = _placed(slots)
        small = self._checked(placed, slots)
        if small is None:
            return False
        for path in (self._matrices, self._small):
            with contextlib.suppress(OSError):  # others may own it
                os.utime(path)
        try:
            with _opened(self._matrices, os.O_RDONLY) as fd:
                for index, (offset, matrix) in enumerate(placed):
                    matrix.column_scales = small[_columns(index)].tolist()
                    matrix.column_order = small[_order(index)].tolist()
                    if self._is_mapped:
                        matrix.map_file(fd, offset)
                    elif _signed(matrix.read_file(ctx, fd, offset)) != small[_SUMS][index]:
                        raise NativeError("bytes have changed since they were written")
        except (OSError, NativeError) as error:
            if self._is_mapped:
                raise CheckpointError(f"cannot map the packed weights {self._matrices}: {error}") from None
            self._say_broken(self._matrices, error)
            for _, matrix in placed:
                matrix.clear()
            return False
        for name, slot in slots.items():
            if slot.matrix is None:
                slot.store(small[name])
        return True

    def _checked(
        self, placed: list[tuple[int, Any]], slots: Mapping[str, Slot]
    ) -> dict[str, torch.Tensor] | None:
        """The small tensors, if they and the size of the matrices are what the slots want."""
        if not self._small.exists():
            return None
        try:
            small = load_file(self._small)
            offset, matrix = placed[-1]
            is_whole = self._matrices.stat().st_size == offset + matrix.num_bytes
        except (OSError, SafetensorError) as error:
            self._say_broken(self._small, error)
            return None
        wanted = {name: slot.shape for name, slot in slots.items() if slot.matrix is None}
        found = {name: tuple(tensor.shape) for name, tensor in small.items() if name in wanted}
        names = {name(index) for index in range(len(placed)) for name in (_columns, _order)}
        if not is_whole or found != wanted or not names | {_SUMS, _SUM} <= small.keys():
            self._say_broken(self._small, "not what was written")
            return None
        if small.pop(_SUM).tolist() != [_sum_of(small)]:
            self._say_broken(self._small, "bytes have changed since they were written")
            return None
        return small

    def _say_broken(self, path: Path, reason: object) -> None:
        log.warning("packed weights %s are broken and are made again: %s", path, reason)

    def recording(self, slots: Mapping[str, Slot]) -> tuple[dict[str, Slot], dict[str, torch.Tensor]]:
        """Slots that keep what is small, and where they keep it."""
        kept: dict[str, torch.Tensor] = {}

        def keep(name: str, slot: Slot, tensor: torch.Tensor) -> None:
            kept[name] = tensor.clone()
            slot.store(tensor)

        def recorded(name: str, slot: Slot) -> Slot:
            if slot.matrix is not None:
                return slot
            return dataclasses.replace(slot, store=lambda tensor: keep(name, slot, tensor))

        return {name: recorded(name, slot) for name, slot in slots.items()}, kept

    def save(self, ctx: Any, slots: Mapping[str, Slot], small: dict[str, torch.Tensor]) -> None:
        """Write both files in a folder beside first: no start ever sees half of one. Failing is no error."""
        try:
            self._remove_unfinished()
            self._remove_old()
            sums = []
            with self._unfinished() as folder:
                with _opened(folder / self._matrices.name, os.O_WRONLY | os.O_CREAT) as fd:
                    for index, (offset, matrix) in enumerate(_placed(slots)):
                        sums.append(_signed(matrix.write_file(ctx, fd, offset)))
                        small[_columns(index)] = torch.tensor(matrix.column_scales)
                        small[_order(index)] = torch.tensor(matrix.column_order, dtype=torch.int32)
                small[_SUMS] = torch.tensor(sums)
                small[_SUM] = torch.tensor([_sum_of(small)])
                save_file(small, folder / self._small.name)
                # Safetensors keeps it from other users, who may have a server on the same directory.
                shutil.copymode(folder / self._matrices.name, folder / self._small.name)
                for path in (self._matrices, self._small):
                    (folder / path.name).replace(path)
        except (OSError, SafetensorError, NativeError) as error:
            log.warning("packed weights cannot be kept in %s: %s%s", self._directory, error, self._room())

    @contextlib.contextmanager
    def _unfinished(self) -> Iterator[Path]:
        """A folder of this writer's own, removed in the end, and locked as long as the process lives."""
        folder = Path(tempfile.mkdtemp(_UNFINISHED, dir=self._directory))
        try:
            with _opened(folder, os.O_RDONLY) as fd:
                with contextlib.suppress(OSError):  # some network file systems lock no folders
                    fcntl.flock(fd, fcntl.LOCK_EX)
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _remove_unfinished(self) -> None:
        """Folders of writers that were killed: as large as the weights, and locked by nobody."""
        for folder in self._directory.glob(f"*{_UNFINISHED}"):
            with contextlib.suppress(OSError), _opened(folder, os.O_RDONLY) as fd:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)

    def _remove_old(self) -> None:
        """Entries that only older versions read, and those that nobody has read for long: another checkpoint
        has replaced theirs, or nobody serves it. Newer ones belong to a newer version, which may run, too."""
        for path in self._directory.iterdir():
            made = _ENTRY.fullmatch(path.name)
            with contextlib.suppress(OSError):
                if made and (int(made[1] or 0) < LAYOUT or time.time() - path.stat().st_mtime > UNUSED_S):
                    path.unlink()
                    log.info("removed old packed weights %s", path)

    def _room(self) -> str:
        """For a message: a full disk is the usual reason."""
        try:
            return f" ({shutil.disk_usage(self._directory).free / 1e6:.0f} MB are free there)"
        except OSError:
            return ""


def cache_key(
    spec: AnySpec, model_path: str | Path, *, load_format: str, dtype: str, quantization: str
) -> str:
    """What the packed bytes depend on, as 32 hexadecimal digits.

    Raises: `CheckpointError` for a file that cannot be read.
    """
    path = Path(model_path)
    files = [] if load_format == "dummy" else _files(path)
    facts = [LAYOUT, load_format == "dummy", [*map(_identity, files)], repr(spec), dtype, quantization]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _files(path: Path) -> Sequence[Path]:
    return GGUFFile(path).paths if is_gguf(path) else checkpoint_files(path)


def _identity(path: Path) -> list[str | int]:
    """What tells a file from others of its name."""
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            last = max(status.st_size - SAMPLE_BYTES, 0)
            for begin in sorted({last * index // (SAMPLES - 1) for index in range(SAMPLES)}):
                digest.update(os.pread(file.fileno(), SAMPLE_BYTES, begin))
    except OSError as error:
        raise CheckpointError(f"cannot read {path.name}: {error.strerror}") from None
    return [path.name, status.st_size, status.st_mtime_ns, digest.hexdigest()]


def _sum_of(small: Mapping[str, torch.Tensor]) -> int:
    """Of names, kinds and bytes."""
    total = 0
    for name, tensor in sorted(small.items()):
        total = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode(), total)
        total = zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy(), total)
    return total


def _signed(word: int) -> int:
    """A word of 64 bits as torch holds it."""
    return word - (word >> 63 << 64)


def _columns(index: int) -> str:
    """Name of a matrix' column scales among the small tensors."""
    return f"columns.{index}"


def _order(index: int) -> str:
    """The same of its column order."""
    return f"order.{index}"


def _placed(slots: Mapping[str, Slot]) -> list[tuple[int, Any]]:
    """Every matrix once, in the order of the slots, and its place in the file."""
    matrices = {id(slot.matrix): slot.matrix for slot in slots.values() if slot.matrix is not None}
    placed, offset = [], 0
    for matrix in matrices.values():
        placed.append((offset, matrix))
        offset += -(-matrix.num_bytes // ALIGNMENT) * ALIGNMENT
    return placed


@contextlib.contextmanager
def _opened(path: Path, flags: int):
    fd = os.open(path, flags, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)
