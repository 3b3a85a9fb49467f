"""Any checkpoint that is served: by a model of ours, else through transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from engine.gguf_file import is_gguf
from engine.models.fallback.spec import TransformersSpec
from engine.models.hf_config import read_config
from engine.models.registry import has_native, read_spec
from engine.models.spec import ModelSpec

if TYPE_CHECKING:
    import torch

    from engine.models.decoder import DecoderInputs
    from engine.models.lora_sites import Site
    from engine.models.weights import Progress, Slot
    from engine.ops.attention_plan import LayerCache
    from engine.ops.placement import Placement

AnySpec = ModelSpec | TransformersSpec


class AnyModel(Protocol):
    """What a runner does with a model; `models.decoder.Decoder` says what each means."""

    def slots(self) -> dict[str, Slot]: ...

    def lora_sites(self) -> list[Site]: ...

    def load(self, directory: str | Path, slots: dict[str, Slot], progress: Progress | None) -> None: ...

    def forward(self, inputs: DecoderInputs, kv_layers: Sequence[LayerCache]) -> torch.Tensor: ...

    def end_step(self) -> None: ...

    def project(self, hidden: torch.Tensor, first_row: int = 0) -> torch.Tensor: ...


def read_any_spec(directory: str | Path, *, trusts_remote_code: bool = False) -> AnySpec:
    """The facts of a checkpoint.

    Effects: for an architecture without a model of ours, imports torch and transformers, for seconds.
    Raises: `ConfigError`, one line, when a file is missing or broken, or neither way can serve the model.
    """
    directory = Path(directory)
    if is_gguf(directory) or not directory.is_dir() or has_native(read_config(directory)):
        return read_spec(directory)
    from engine.models.fallback.skeleton import Skeleton

    return Skeleton(directory, trusts_remote_code=trusts_remote_code).spec


def build_model(
    spec: AnySpec,
    directory: str | Path,
    dtype: str,
    *,
    ops: ModuleType,
    ctx: Any,
    quantization: str,
    placement: Placement,
    **bounds: int,
) -> AnyModel:
    """The model without weights. `bounds` are those of `Decoder`. Raises: `ConfigError`."""
    common: dict[str, Any] = {"ops": ops, "ctx": ctx, "quantization": quantization}
    if isinstance(spec, ModelSpec):
        from engine.models.decoder import Decoder

        return Decoder(spec, dtype, placement=placement, **common, **bounds)
    from engine.models.fallback.decoder import TransformersDecoder

    return TransformersDecoder(spec, directory, dtype, **common)
