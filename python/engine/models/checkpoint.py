"""A checkpoint in any of its forms: a directory as Hugging Face saves it, or one GGUF file."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from engine.gguf_file import GGUFFile, is_gguf
from engine.models.gguf_weights import load_gguf
from engine.models.hf_config import read_config
from engine.models.quantized_config import Quantization, quantized_matrices, read_quantization
from engine.models.quantized_weights import with_quantized
from engine.models.spec import ModelSpec
from engine.models.text_part import is_of_other_part, name_in_part
from engine.models.weights import Progress, Slot, load_checkpoint, tensor_names

log = logging.getLogger(__name__)


def load_weights(
    path: str | Path,
    spec: ModelSpec,
    slots: Mapping[str, Slot],
    *,
    is_ignored: Callable[[str], bool] = lambda name: False,
    progress: Progress | None = None,
) -> None:
    """Store every tensor of the checkpoint in its slot.

    Effects: warns of matrices that are dequantised, because no packed matrix holds what they are.
    Raises: `CheckpointError`, as the loaders.
    """
    if is_gguf(path):
        load_gguf(GGUFFile(path), spec, slots, is_ignored=is_ignored, progress=progress)
        return
    names = tensor_names(path)
    theirs = {name_in_part(name): name for name in names}
    if quantizations := read_quantization(read_config(path)):
        found = quantized_matrices(Path(path), quantizations)
        stored = {name_in_part(name): matrix.quantization for name, matrix in found.items()}
        stored = {name: kind for name, kind in stored.items() if not is_ignored(f"{name}.weight")}
        warn_of_dequantized(path, stored)
        slots = with_quantized(slots, stored, theirs)
    has_parts = theirs.keys() != names
    load_checkpoint(
        path,
        {theirs.get(name, name): slot for name, slot in slots.items()},
        is_ignored=lambda name: is_ignored(name_in_part(name)) or (has_parts and is_of_other_part(name)),
        progress=progress,
    )


def warn_of_dequantized(path: str | Path, stored: Mapping[str, Quantization]) -> None:
    """One line for each kind of matrices that no packed format holds, or no model takes as they are."""
    for kind, count in Counter(kind for kind in stored.values() if not kind.is_packable).items():
        why = "models through transformers do not take" if kind.is_dequantized else "no packed format holds"
        log.warning(
            "%s: %d matrices are %s, which %s; they are dequantised", Path(path).name, count, kind.kind, why
        )
