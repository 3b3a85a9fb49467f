"""Fill a model from a GGUF file: quantised tensors as they are, where a packed matrix can hold them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import torch

from engine.gguf_file import GGUFFile, TensorInfo
from engine.models.coded_weight import CodedWeight
from engine.models.gguf_blocks import TAKE_APART
from engine.models.gguf_names import gguf_name
from engine.models.spec import ModelSpec
from engine.models.weights import NAMES_SHOWN, Progress, Slot, progress_bar

log = logging.getLogger(__name__)

_IGNORED = frozenset(
    ["rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"]
)  # part of the configuration
_SIDE_BY_SIDE = frozenset(["granite", "llama", "smollm3"])
_FLOATS = MappingProxyType({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16})


def load_gguf(
    file: GGUFFile,
    spec: ModelSpec,
    slots: Mapping[str, Slot],
    *,
    is_ignored: Callable[[str], bool] = lambda name: False,
    progress: Progress | None = None,
) -> None:
    """Store every tensor of the file in its slot; as `weights.load_checkpoint`.

    Effects: warns of matrices that are dequantised, because no packed matrix holds what they are.
    Raises: `CheckpointError` that names the tensor at fault.
    """
    infos = {name: _checked(file, spec, name, slot) for name, slot in slots.items()}
    left_over = file.tensors.keys() - {info.name for info in infos.values()} - _IGNORED
    left_over = {name for name in left_over if not is_ignored(name)}
    if left_over:
        listed = ", ".join(sorted(left_over)[:NAMES_SHOWN])
        raise file.error(f"has tensors that this architecture does not: {listed}")
    _warn_of_dequantised(file, infos)
    total = sum(math.prod(slot.shape) for slot in slots.values())
    with progress_bar(total, progress) as advance:
        for name, slot in slots.items():
            slot.store(_in_our_order(_weight(file, infos[name]), file, spec, name))
            advance(math.prod(slot.shape))


def _checked(file: GGUFFile, spec: ModelSpec, name: str, slot: Slot) -> TensorInfo:
    theirs, expert = gguf_name(file.architecture, name)
    info = file.tensors.get(theirs)
    if info is None:
        raise file.error(f"lacks {theirs}")
    shape = slot.shape
    if expert is not None and spec.experts is not None:
        shape = (spec.experts.num_experts, *shape)
    if info.shape != shape:
        raise file.error(f"tensor {info.name} has shape {list(info.shape)}, expected {list(shape)}")
    return info if expert is None else info.part(expert)


def _weight(file: GGUFFile, info: TensorInfo) -> torch.Tensor | CodedWeight:
    data = file.read(info)
    if info.type.name in _FLOATS:
        return torch.from_numpy(data).view(_FLOATS[info.type.name]).view(info.shape)
    rows = data.reshape(info.shape[0], -1, info.type.block_bytes)
    if info.type.name in TAKE_APART and len(info.shape) == 2:
        return TAKE_APART[info.type.name](rows)
    try:
        from gguf import GGMLQuantizationType, dequantize  # late: it takes a second
    except ImportError:
        kind = f"tensor {info.name} is {info.type.name}"
        raise file.error(f"{kind}, which needs the gguf package: pip install gguf") from None
    values = dequantize(rows.reshape(info.shape[0], -1), GGMLQuantizationType[info.type.name])
    return torch.from_numpy(np.ascontiguousarray(values)).view(info.shape).bfloat16()


def _in_our_order(
    weight: torch.Tensor | CodedWeight, file: GGUFFile, spec: ModelSpec, name: str
) -> torch.Tensor | CodedWeight:
    """Undo what llama.cpp does to query and key rows of the llama architecture and of those that it computes
    alike: it puts next to each other the two rows of a head that rotate together, which stand half a head
    apart here."""
    is_key = ".k_proj." in name
    if file.architecture not in _SIDE_BY_SIDE or not (is_key or ".q_proj." in name):
        return weight
    heads = spec.num_kv_heads if is_key else spec.num_heads
    order = torch.arange(heads * spec.head_dim).view(heads, -1, 2).transpose(1, 2).flatten()
    return weight.rows(order) if isinstance(weight, CodedWeight) else weight[order]


def _warn_of_dequantised(file: GGUFFile, infos: Mapping[str, TensorInfo]) -> None:
    held = TAKE_APART.keys() | _FLOATS.keys()
    tensors = {info.name: info.type.name for info in infos.values()}
    others = [kind for kind in tensors.values() if kind not in held]
    if others:
        kinds = ", ".join(sorted(set(others)))
        log.warning(
            "%s: %d of %d tensors are %s, which no packed format holds; they become bfloat16",
            file.path.name,
            len(others),
            len(tensors),
            kinds,
        )
