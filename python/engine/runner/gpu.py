"""The GPU that an engine is to run on, or why there is none."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Generator
from typing import Any, TypeVar

from engine.errors import ConfigError, DeviceLost

T = TypeVar("T")
LEAST_CAPABILITY = (8, 0)
FP8_CAPABILITY = (8, 9)


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What resolving needs to know of it. `capability` is CUDA's compute capability."""

    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int

    @classmethod
    def this(cls) -> Gpu:
        """The first GPU that this process may use.

        Effects: imports torch, and takes some hundred megabytes of the GPU for this process.
        Raises: `ConfigError`, one line, when there is no usable GPU.
        """
        from engine import _native

        if not _native.cuda_is_compiled():
            raise ConfigError(
                "--device cuda: this build has no CUDA kernels; install it again where nvcc is on the PATH"
            )
        if importlib.util.find_spec("triton") is None:
            raise ConfigError("--device cuda needs Triton: pip install triton")
        import torch

        if torch.version.cuda is None:
            raise ConfigError("--device cuda: the installed torch is built without CUDA")
        if not torch.cuda.is_available():
            raise ConfigError("--device cuda: the driver shows this process no NVIDIA GPU")
        try:
            torch.cuda.empty_cache()  # what an engine that was closed in this process left with torch is free
            free, total = torch.cuda.mem_get_info()
            found = torch.cuda.get_device_properties(0)
        except RuntimeError as error:  # another process may have it to itself, or it is broken
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"--device cuda: the GPU cannot be used: {reason}") from None
        gpu = cls(found.name, (found.major, found.minor), total, free)
        if gpu.capability < LEAST_CAPABILITY:
            raise ConfigError(f"--device cuda: {gpu.name} is too old: its compute capability is below 8.0")
        return gpu


def raise_if_lost(context: Any, error: Exception) -> None:
    """Raises: `DeviceLost` where the GPU of `context` computes nothing more after `error`."""
    if getattr(context, "is_lost", False):
        reason = " ".join(str(error).split())[:300]
        raise DeviceLost(f"the GPU computes nothing more for this process: {reason}") from error


def watching_for_loss(context: Any, work: Generator[None, None, T]) -> Generator[None, None, T]:
    """The same work. Raises: what it raises, or `DeviceLost`, as `raise_if_lost`."""
    try:
        return (yield from work)
    except Exception as error:
        raise_if_lost(context, error)
        raise
