"""Read an adapter in PEFT's format, check it against the model, and pack it for the kernels."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from engine.adapters.peft_config import MAX_CONFIG_BYTES, PeftConfig, invalid_adapter
from engine.errors import EngineError, InvalidRequest, NativeError
from engine.models.lora_sites import EMBEDDING, Part, Site
from engine.models.weights import read_one_tensor
from engine.ops.placement import CPU, Placement

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_BASE_COPIES = ("model.embed_tokens", "embed_tokens", "lm_head")
_HEADLESS = re.compile(r"base_model\.model\.(layers|embed_tokens)\.")
_NAMES_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class CheckedAdapter:
    """An adapter that can be used. `digest` names the contents of its files."""

    digest: str
    rank: int
    """The largest of its modules."""


@dataclasses.dataclass(frozen=True)
class LoadedAdapter(CheckedAdapter):
    """An adapter in use."""

    weights: Any


class _Contents(NamedTuple):
    """What its files hold, checked."""

    config: PeftConfig
    sites: Sequence[Site]
    tensors: Mapping[str, torch.Tensor]
    digest: str
    rank: int


class AdapterReader:
    """Loads adapters for one model, whose layers are `sites`. `dtype` is that in which their weights are
    kept, `ops` as for the model.

    They may have been made for the model with its head or, as those for embeddings are, without: then
    their names lack its "model.".

    Not tied to a thread; reading and packing release the interpreter lock for most of their time.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        base_directory: str | Path,
        *,
        dtype: str,
        max_rank: int,
        ops: ModuleType,
        placement: Placement = CPU,
    ) -> None:
        self._sites = sites
        self._headless_sites = [
            *map(_headless, sites[:-1]),
            *(site._replace(parts=()) for site in sites[-1:]),
        ]
        self._base_directory = Path(base_directory)
        self._dtype, self._max_rank, self._ops = dtype, max_rank, ops
        self._placement = placement

    def check(self, directory: str | Path) -> CheckedAdapter:
        """Everything is looked at, nothing is kept; while it runs, the weights are in memory, at most twice.

        Raises: `InvalidRequest` (invalid_adapter) that names the field or tensor at fault.
        """
        contents = self._read(Path(directory))
        return CheckedAdapter(contents.digest, contents.rank)

    def load(self, directory: str | Path) -> LoadedAdapter:
        """Checked and packed for use. Raises as `check`."""
        contents = self._read(Path(directory))
        weights = self._pack(contents.config, contents.sites, contents.tensors)
        return LoadedAdapter(contents.digest, contents.rank, weights)

    def _read(self, directory: Path) -> _Contents:
        config_data = read_regular_file(directory / CONFIG_FILE, MAX_CONFIG_BYTES)
        config = PeftConfig.parse(config_data)
        path = directory / WEIGHTS_FILE
        if not path.exists() and (directory / "adapter_model.bin").exists():
            raise invalid_adapter(f"{WEIGHTS_FILE} is missing; pickled weights (.bin) are not read")
        found = _read_header(path)
        all_sites = self._headless_sites if any(map(_HEADLESS.match, found)) else self._sites
        sites = [_targeted(site, config) for site in all_sites]
        ranks = [config.rank_of(part.name) for site in sites for part in site.parts]
        if not ranks:
            raise invalid_adapter("its target_modules name no module of this model")
        copies = _check_tensors(found, self._expected_shapes(config, sites))
        embedding = self._sites[EMBEDDING]
        for name in copies:  # before anything of it is read
            if found[name][0] != (embedding.in_features, embedding.parts[0].num_columns):
                raise _changed_base(name)
        data = read_regular_file(path)
        digest = _digest(config_data, data)
        try:
            tensors = safetensors.torch.load(data)
        except (SafetensorError, ValueError) as error:
            raise invalid_adapter(f"{WEIGHTS_FILE} is broken: {_one_line(error)}") from None
        for name in copies:
            self._check_copy(name, tensors[name])
        return _Contents(config, sites, tensors, digest, max(ranks))

    def _expected_shapes(self, config: PeftConfig, sites: Sequence[Site]) -> dict[str, tuple[int, int]]:
        expected = {}
        for number, site in enumerate(sites):
            for part in site.parts:
                rank = config.rank_of(part.name)
                if rank > self._max_rank:
                    raise invalid_adapter(
                        f"{part.name} has rank {rank}, but --max-lora-rank is {self._max_rank}"
                    )
                a_name, b_name = _tensor_names(number == EMBEDDING, part.name)
                expected[a_name] = rank, site.in_features
                expected[b_name] = part.num_columns, rank
        return expected

    def _check_copy(self, name: str, tensor: torch.Tensor) -> None:
        """PEFT stores the base's embedding beside an adapter of it; a changed one is not served."""
        embedding = ("model.embed_tokens.weight", "embed_tokens.weight")
        names = embedding if "embed_tokens" in name else ("lm_head.weight", *embedding)  # it may be tied
        try:
            found = (read_one_tensor(self._base_directory, own) for own in names)
            base = next((tensor for tensor in found if tensor is not None), None)
        except EngineError:
            base = None
        if base is None or base.shape != tensor.shape or not torch.equal(base.to(tensor.dtype), tensor):
            raise _changed_base(name)

    def _pack(self, config: PeftConfig, sites: Sequence[Site], tensors: Mapping[str, torch.Tensor]) -> Any:
        shapes = [
            (site.in_features, number == EMBEDDING, [_module(config, part) for part in site.parts])
            for number, site in enumerate(sites)
        ]
        try:
            with self._placement.making():
                weights = self._ops.LoraAdapter(self._dtype, shapes)
            for number, site in enumerate(sites):
                for index, part in enumerate(site.parts):
                    a_name, b_name = _tensor_names(number == EMBEDDING, part.name)
                    weights.pack(number, index, tensors[a_name], tensors[b_name])
        except NativeError as error:
            raise invalid_adapter(error.message) from None
        return weights


def read_regular_file(path: Path, most_bytes: int | None = None) -> bytes:
    """Raises: `InvalidRequest` for what is absent, too large, or no file: a pipe would never end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise invalid_adapter(f"cannot read {path.name}: {error.strerror}") from None
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise invalid_adapter(f"{path.name} is no regular file")
        if most_bytes is not None and status.st_size > most_bytes:
            raise invalid_adapter(f"{path.name} has {status.st_size} bytes, more than {most_bytes}")
        return file.read()


def _headless(site: Site) -> Site:
    return site._replace(
        parts=tuple(part._replace(name=part.name.removeprefix("model.")) for part in site.parts)
    )


def _targeted(site: Site, config: PeftConfig) -> Site:
    """With only the parts that the adapter is for."""
    return site._replace(parts=tuple(part for part in site.parts if config.is_targeted(part.name)))


def _read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shapes and types by name, without reading data."""
    if not path.is_file():
        raise invalid_adapter(f"{path.name} is missing or no regular file")
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                entry = file.get_slice(name)
                found[name] = tuple(entry.get_shape()), entry.get_dtype()
    except (SafetensorError, OSError, ValueError) as error:
        raise invalid_adapter(f"{path.name} is broken or truncated: {_one_line(error)}") from None
    return found


def _check_tensors(
    found: Mapping[str, tuple[tuple[int, ...], str]], expected: Mapping[str, tuple[int, int]]
) -> list[str]:
    """Returns the names of copies of the base."""
    copies = [name for name in found if name not in expected and _is_copy(name)]
    left_over = [name for name in found if name not in expected and name not in copies]
    if any("lora_magnitude_vector" in name for name in left_over):
        raise invalid_adapter("DoRA is not supported")
    if missing := [name for name in expected if name not in found]:
        raise invalid_adapter(f"{WEIGHTS_FILE} lacks {_listed(missing)}")
    if left_over:
        raise invalid_adapter(
            f"{WEIGHTS_FILE} has tensors that its configuration or the model does not: {_listed(left_over)}"
        )
    for name, shape in expected.items():
        if found[name][0] != shape:
            raise invalid_adapter(
                f"{name} has shape {list(found[name][0])}, but for this model and rank it "
                f"must be {list(shape)}"
            )
        if found[name][1] not in ("F32", "F16", "BF16"):
            raise invalid_adapter(f"{name} has type {found[name][1]}, expected F32, F16 or BF16")
    return copies


def _changed_base(name: str) -> InvalidRequest:
    return invalid_adapter(f"{name} is not the base model's: added or changed tokens are not supported")


def _is_copy(name: str) -> bool:
    stem = name.removeprefix(_PREFIX).removesuffix(".weight").removesuffix(".base_layer")
    return name.endswith(".weight") and stem in _BASE_COPIES


def _tensor_names(is_embedding: bool, module: str) -> tuple[str, str]:
    if is_embedding:
        return f"{_PREFIX}{module}.lora_embedding_A", f"{_PREFIX}{module}.lora_embedding_B"
    return f"{_PREFIX}{module}.lora_A.weight", f"{_PREFIX}{module}.lora_B.weight"


def _module(config: PeftConfig, part: Part) -> tuple[int, int, int, float]:
    return part.first_column, part.num_columns, config.rank_of(part.name), config.scale_of(part.name)


def _digest(*contents: bytes) -> str:
    digest = hashlib.sha256()
    for content in contents:
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
