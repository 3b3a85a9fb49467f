"""What can be chosen for a GPU, and what of its memory goes where: said before anything is loaded."""

from __future__ import annotations

import dataclasses

from engine.config.engine_config import EngineConfig
from engine.errors import ConfigError
from engine.models.any_model import AnySpec
from engine.models.spec import ModelSpec
from engine.runner.gpu import FP8_CAPABILITY, Gpu
from engine.runner.memory import (
    DTYPE_BYTES,
    PACKED_ELEMENTS,
    PACKING_BYTES,
    StepBounds,
    gpu_text_bytes,
    graph_bytes,
    step_bytes,
)

MEM_FRACTION_STATIC = 0.88
HEAD_DIMS = range(64, 257, 16)
"""What the attention kernels take."""

FOLLOWS_BATCH = "products and attention follow the batch; --deterministic changes that"
"""Why an answer of a GPU may depend on who shares its batch."""

_CPU_ONLY = {
    "quantization": {"bf16_dot"},
    "kv_cache_dtype": {"int8"},
}
_GPU_ONLY = {
    "dtype": {"float16"},
    "quantization": {"fp8"},
    "kv_cache_dtype": {"fp8"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuBudget:
    """The memory of a GPU in bytes. `fraction` of it is given away at start; libraries and adapters take from
    the rest."""

    name: str
    total_bytes: int
    in_use_bytes: int
    fraction: float
    weight_bytes: int
    loading_bytes: int
    """What quantising takes beside the weights, before anything else is allocated."""
    parts: dict[str, int]
    """Of steps and of graphs."""

    @property
    def left_bytes(self) -> int:
        """For the KV cache; negative where even the rest does not fit."""
        return self._static_bytes - self.weight_bytes - sum(self.parts.values())

    @property
    def can_load(self) -> bool:
        return self._static_bytes >= self.weight_bytes + self.loading_bytes

    @property
    def _static_bytes(self) -> int:
        return int(self.total_bytes * self.fraction) - self.in_use_bytes

    def pool_tokens(self, most_tokens: int, block_bytes: int, block_size: int) -> tuple[int, str]:
        """Tokens of the KV cache, and why. One block more is for rows that fill up captured steps."""
        num_blocks = max(self.left_bytes, 0) // block_bytes - 1 if self.can_load else 0
        if num_blocks * block_size >= most_tokens:
            return most_tokens, f"a whole context for each running request, and room for more: {self}"
        return num_blocks * block_size, str(self)

    def __str__(self) -> str:
        parts = " - ".join(f"{_gib(size)} for {name}" for name, size in self.parts.items())
        loading = f" (and {_gib(self.loading_bytes)} while they are packed)" if self.loading_bytes else ""
        return (
            f"{self.fraction:g} of {_gib(self.total_bytes)} - {_gib(self.in_use_bytes)} in use - "
            f"{_gib(self.weight_bytes)} of weights{loading} - {parts} = "
            f"{_gib(self.left_bytes)} for the KV cache"
        )


def check_device_flags(config: EngineConfig) -> None:
    """Raises: `ConfigError` for a choice that the other device has."""
    elsewhere = _GPU_ONLY if config.device == "cpu" else _CPU_ONLY
    other = "--device cuda" if config.device == "cpu" else "the CPU"
    for field, values in elsewhere.items():
        if (value := getattr(config, field)) in values:
            raise ConfigError(f"--{field.replace('_', '-')} {value} is for {other}")
    if config.device == "cpu":
        given = {"mem_fraction_static": config.mem_fraction_static is not None}
        given["disable_cuda_graph"] = config.disable_cuda_graph
    else:
        given = {name: bool(getattr(config, name)) for name in ("num_threads", "packed_cache")}
    for field, is_given in given.items():
        if is_given:
            raise ConfigError(f"--{field.replace('_', '-')} is for {other}")


def check_served(config: EngineConfig, spec: AnySpec, gpu: Gpu) -> None:
    """Raises: `ConfigError` for a model, or something beside it, that is not computed on a GPU yet."""
    if not isinstance(spec, ModelSpec):
        _refuse(f"{spec.architecture} runs through transformers")
    check_heads(spec)
    check_fp8(config.quantization, gpu)


def check_fp8(quantization: str, gpu: Gpu) -> None:
    """Raises: `ConfigError` for a GPU whose tensor cores do not have it."""
    if quantization == "fp8" and gpu.capability < FP8_CAPABILITY:
        raise ConfigError(
            f"--quantization fp8 needs a GPU of compute capability 8.9 or more; {gpu.name} has "
            f"{gpu.capability[0]}.{gpu.capability[1]}"
        )


def check_heads(spec: ModelSpec) -> None:
    """Raises: `ConfigError` for a decoder whose heads the kernels do not take."""
    if spec.head_dim not in HEAD_DIMS:
        _refuse(f"its heads have {spec.head_dim} elements; kernels take multiples of 16 from 64 to 256")


def share_of(config: EngineConfig, gpu: Gpu) -> tuple[int, str]:
    """Bytes of a GPU that may be given away at start, and how they come about."""
    fraction, in_use = config.mem_fraction_static or MEM_FRACTION_STATIC, gpu.total_bytes - gpu.free_bytes
    told = f"{fraction:g} of {_gib(gpu.total_bytes)} - {_gib(in_use)} in use"
    return int(gpu.total_bytes * fraction) - in_use, told


def gpu_budget(
    config: EngineConfig,
    spec: AnySpec,
    gpu: Gpu,
    weights: int,
    dtype: str,
    bounds: StepBounds,
    embedding_bytes: int = 0,
) -> GpuBudget:
    """`embedding_bytes` are those of an embedding model beside the chat model."""
    assert isinstance(spec, ModelSpec)
    parts = step_bytes(spec, bounds, dtype, config.quantization)
    if not config.disable_cuda_graph:
        parts["graphs"] = graph_bytes(spec, bounds.max_rows, bounds.context_length, DTYPE_BYTES[dtype])
    if config.pooling is not None and config.embedding_model is None:
        lens = bounds.max_tokens, bounds.context_length
        parts["texts"] = gpu_text_bytes(spec, dtype, bounds.block_size, *lens)
    if embedding_bytes:
        parts["the embedding model"] = embedding_bytes
    packs = config.quantization != "none" or spec.stored
    return GpuBudget(
        name=gpu.name,
        total_bytes=gpu.total_bytes,
        in_use_bytes=gpu.total_bytes - gpu.free_bytes,
        fraction=config.mem_fraction_static or MEM_FRACTION_STATIC,
        weight_bytes=weights,
        loading_bytes=PACKED_ELEMENTS * PACKING_BYTES if packs else 0,
        parts=parts,
    )


def _refuse(reason: str) -> None:
    raise ConfigError(f"--device cuda does not serve this model yet: {reason}")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
