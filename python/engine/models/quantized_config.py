"""What config.json and the tensors of a checkpoint say about weights in few bits. No torch here.

Source: the quantization_config that AutoAWQ, GPTQModel and compressed-tensors write.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from engine.errors import CheckpointError, ConfigError
from engine.models.checkpoint_files import stored_tensors
from engine.models.hf_config import flag, integer
from engine.models.spec import StoredFormat

SUPPORTED = "awq, gptq and compressed-tensors"
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Dtype and shape of each tensor of a checkpoint."""


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How the matrices of a checkpoint are stored. `group_size` 0: one group a row.

    `marker` and `scales` end the names of tensors that a quantised matrix has, and no other.
    """

    method: str
    bits: int
    group_size: int
    is_symmetric: bool
    has_order: bool
    marker: str
    scales: str
    zero_bias: int = 0
    """What is added to stored zero points."""

    is_dequantized: bool = False
    """Whether it becomes floats even where a packed matrix could hold it."""

    @property
    def group_len(self) -> int:
        """Of packed matrices: larger groups are taken apart into these."""
        return 32 if self.group_size % 128 else 128

    @property
    def is_packable(self) -> bool:
        """Whether a packed matrix holds exactly this; otherwise it becomes floats while it is loaded."""
        is_exact = self.group_size % 32 == 0 and (self.bits == 4 or self.is_symmetric)
        return is_exact and not self.is_dequantized

    @property
    def kind(self) -> str:
        """In words."""
        zeros = "" if self.is_symmetric else " with zero points"
        return f"int{self.bits}{zeros} in groups of {self.group_size or 'a row'}"

    def stored(self, scale_dtype: str) -> StoredFormat:
        if self.bits == 8:
            dtype = "int8"
        else:
            dtype = "int4" if self.is_symmetric and scale_dtype == "F16" else "int4_affine"
        return StoredFormat(dtype, self.group_len, self.has_order)


def read_quantization(config: Mapping[str, Any]) -> tuple[Quantization, ...]:
    """The ways in which matrices may be stored: none for checkpoints in full precision, and where the family
    reads its own.

    Raises: `ConfigError`, one line, for methods and settings that are not supported.
    """
    facts = config.get("quantization_config")
    method = facts.get("quant_method") if isinstance(facts, Mapping) else None
    if not isinstance(method, str) or method not in _READERS:
        return ()
    found = _READERS[method](facts)
    return found if isinstance(found, tuple) else (found,)


def is_supported(method: Any) -> bool:
    return isinstance(method, str) and method in _READERS


class StoredMatrix(NamedTuple):
    """How one matrix is stored, the dtype of its scales as the header of its file names it, and its size."""

    quantization: Quantization
    scale_dtype: str
    num_elements: int

    @property
    def packed_as(self) -> StoredFormat | None:
        """None for one that becomes floats while it is loaded."""
        quantization = self.quantization
        return quantization.stored(self.scale_dtype) if quantization.is_packable else None


def quantized_matrices(directory: Path, quantizations: Sequence[Quantization]) -> dict[str, StoredMatrix]:
    """Every quantised matrix by its name without ".weight". Where config.json has several ways, the tensors
    of a matrix tell which it has, not the patterns of names there, which are written in several dialects.

    Raises: `CheckpointError` for broken files, where none is quantised, and where no way fits, or several.
    """
    tensors = stored_tensors(directory)
    found: dict[str, StoredMatrix] = {}
    for marker, scales in dict.fromkeys((q.marker, q.scales) for q in quantizations):
        for name in (name.removesuffix(marker) for name in tensors if name.endswith(marker)):
            if name + scales in tensors:
                ways = [q for q in quantizations if q.marker == marker]
                way, (dtype, shape) = _only(name, ways, tensors), tensors[name + marker]
                size = math.prod(shape) * (32 // way.bits if dtype == "I32" else 1)
                found[name] = StoredMatrix(way, tensors[name + scales][0], size)
    if not found:
        raise CheckpointError(f"config.json says {quantizations[0].method}, but no tensor is stored so")
    return found


def _only(name: str, ways: Sequence[Quantization], tensors: Tensors) -> Quantization:
    if len(ways) > 1:
        ways = [way for way in ways if _fits(name, way, tensors)]
    if len(ways) != 1:
        how_many = "none" if not ways else "more than one"
        raise CheckpointError(f"{name}: {how_many} of the config_groups of config.json fits its tensors")
    way = ways[0]
    if way.method.startswith("awq") and way.is_symmetric:
        has_zeros = any(key.endswith(".qzeros") for key in tensors)
        return dataclasses.replace(way, is_symmetric=not has_zeros)
    return way


def _fits(name: str, way: Quantization, tensors: Tensors) -> bool:
    (dtype, codes), (_, scales) = tensors[name + way.marker], tensors[name + way.scales]
    if len(codes) != 2 or len(scales) != 2:
        return False
    in_word = 32 // way.bits if dtype == "I32" else 1
    has_zeros, has_order = (f"{name}.{part}" in tensors for part in ("weight_zero_point", "weight_g_idx"))
    columns = codes[1] * in_word
    groups = -(-columns // way.group_size) if way.group_size else 1
    return scales[1] == groups and has_zeros != way.is_symmetric and has_order == way.has_order


def _awq(facts: Mapping[str, Any]) -> Quantization:
    _expect_bits(facts, "awq", ("bits", "w_bit"))
    version = facts.get("version", "gemm")
    kind = version.lower() if isinstance(version, str) else ""
    if kind not in ("gemm", "gemv"):
        raise ConfigError(f"config.json: awq version {version!r:.80} is not supported; supported: gemm, gemv")
    return Quantization(
        method="awq" if kind == "gemm" else "awq-gemv",
        bits=4,
        group_size=_group_size(facts, ("group_size", "q_group_size")),
        is_symmetric=not flag(facts, "zero_point", True),  # where there are qzeros, they count
        has_order=False,
        marker=".qweight",
        scales=".scales",
    )


def _gptq(facts: Mapping[str, Any]) -> Quantization:
    _expect_bits(facts, "gptq", ("bits",))
    layout = facts.get("checkpoint_format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise ConfigError(f"config.json: checkpoint_format {layout!r:.80} is not supported")
    return Quantization(
        method="gptq",
        bits=4,
        group_size=_group_size(facts, ("group_size",)),
        is_symmetric=flag(facts, "sym"),
        has_order=flag(facts, "desc_act"),
        marker=".qweight",
        scales=".scales",
        zero_bias=1 if layout == "gptq" else 0,
    )


def _compressed_tensors(facts: Mapping[str, Any]) -> tuple[Quantization, ...]:
    groups = facts.get("config_groups")
    values = list(groups.values()) if isinstance(groups, Mapping) else []
    found = [_config_group(group, facts.get("format")) for group in values if _has_weights(group)]
    if not found:
        raise ConfigError("config.json: compressed-tensors needs a config_group with weights")
    return tuple(dict.fromkeys(found))


def _has_weights(group: Any) -> bool:
    return isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping)


def _config_group(group: Mapping[str, Any], usual_layout: Any) -> Quantization:
    weights, layout = group["weights"], group.get("format") or usual_layout
    if layout not in ("pack-quantized", "int-quantized"):
        raise ConfigError(
            f"config.json: compressed-tensors format {layout!r:.80} is not supported; "
            "supported: pack-quantized, int-quantized"
        )
    bits, strategy = integer(weights, "num_bits"), weights.get("strategy")
    is_packed, is_symmetric = layout == "pack-quantized", flag(weights, "symmetric", True)
    if weights.get("type", "int") != "int" or bits not in ((4, 8) if is_packed else (8,)):
        raise ConfigError(f"config.json: {bits} bits of type {weights.get('type')!r:.20} are not supported")
    if strategy not in ("group", "channel"):
        raise ConfigError(
            f"config.json: strategy {strategy!r:.80} is not supported; supported: group, channel"
        )
    return Quantization(
        method=str(layout),
        bits=bits,
        group_size=_group_size(weights, ("group_size",)) if strategy == "group" else 0,
        is_symmetric=is_symmetric,
        has_order=weights.get("actorder") in ("group", "dynamic", True),
        marker=".weight_packed" if is_packed else ".weight",
        scales=".weight_scale",
    )


def _expect_bits(facts: Mapping[str, Any], method: str, keys: tuple[str, ...]) -> None:
    bits = next((facts[key] for key in keys if key in facts), None)
    if bits != 4:
        raise ConfigError(f"config.json: {method} with {bits!r:.20} bits is not supported; supported: 4")


def _group_size(facts: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    key = next((key for key in keys if key in facts), keys[0])
    if facts.get(key) == -1:
        return 0
    return integer(facts, key)


_READERS: Mapping[str, Callable[[Mapping[str, Any]], Quantization | tuple[Quantization, ...]]] = (
    MappingProxyType({"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed_tensors})
)
