"""What config.json and the tensors of a checkpoint say about weights in few bits. No torch here.

Source: the quantization_config that AutoAWQ, GPTQModel and compressed-tensors write.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from engine.errors import CheckpointError, ConfigError
from engine.models.checkpoint_files import stored_dtypes
from engine.models.hf_config import flag, integer
from engine.models.spec import StoredFormat

SUPPORTED = "awq, gptq and compressed-tensors"


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

    @property
    def group_len(self) -> int:
        """Of packed matrices: larger groups are taken apart into these."""
        return 32 if self.group_size % 128 else 128

    @property
    def is_packable(self) -> bool:
        """Whether a packed matrix holds exactly this; otherwise it becomes floats while it is loaded."""
        return self.group_size % 32 == 0 and (self.bits == 4 or self.is_symmetric)

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


def read_quantization(config: Mapping[str, Any]) -> Quantization | None:
    """None for checkpoints in full precision, and where the family reads its own.

    Raises: `ConfigError`, one line, for methods and settings that are not supported.
    """
    facts = config.get("quantization_config")
    method = facts.get("quant_method") if isinstance(facts, Mapping) else None
    if not isinstance(method, str) or method not in _READERS:
        return None
    return _READERS[method](facts)


def is_supported(method: Any) -> bool:
    return isinstance(method, str) and method in _READERS


def stored_formats(directory: Path, quantization: Quantization) -> dict[str, StoredFormat]:
    """The matrices that are packed as they are, by name without ".weight".

    Raises: `CheckpointError` for broken files, and where none is quantised.
    """
    scale_dtypes = quantized_matrices(directory, quantization)
    if not quantization.is_packable:
        return {}
    return {name: quantization.stored(dtype) for name, dtype in scale_dtypes.items()}


def quantized_matrices(directory: Path, quantization: Quantization) -> dict[str, str]:
    """The dtype of the scales of each quantised matrix, as the headers of the files name them.

    Raises: `CheckpointError` for broken files, and where none is quantised.
    """
    dtypes = stored_dtypes(directory)
    marker, scales = quantization.marker, quantization.scales
    names = [name.removesuffix(marker) for name in dtypes if name.endswith(marker)]
    names = [name for name in names if name + scales in dtypes]
    if not names:
        raise CheckpointError(f"config.json says {quantization.method}, but no tensor is stored so")
    return {name: dtypes[name + scales] for name in names}


def _awq(facts: Mapping[str, Any]) -> Quantization:
    _expect_bits(facts, "awq", ("bits", "w_bit"))
    version = facts.get("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise ConfigError(f"config.json: awq version {version!r:.80} is not supported; supported: gemm")
    return Quantization(
        method="awq",
        bits=4,
        group_size=_group_size(facts, ("group_size", "q_group_size")),
        is_symmetric=False,  # zero_point false or not, qzeros are there and are what counts
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


def _compressed_tensors(facts: Mapping[str, Any]) -> Quantization:
    layout, groups = facts.get("format"), facts.get("config_groups")
    if layout not in ("pack-quantized", "int-quantized"):
        raise ConfigError(
            f"config.json: compressed-tensors format {layout!r:.80} is not supported; "
            "supported: pack-quantized, int-quantized"
        )
    values = list(groups.values()) if isinstance(groups, Mapping) else []
    weights = values[0].get("weights") if len(values) == 1 and isinstance(values[0], Mapping) else None
    if not isinstance(weights, Mapping):
        raise ConfigError("config.json: compressed-tensors needs one config_group with weights")
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


_READERS: Mapping[str, Callable[[Mapping[str, Any]], Quantization]] = MappingProxyType(
    {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed_tensors}
)
