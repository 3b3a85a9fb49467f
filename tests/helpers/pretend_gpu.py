"""A GPU that is none: what goes to it stays on the CPU, where its kernels are emulated and interpreted.

For code that was written for a GPU and must not wait for one to be found broken: bench/gpu and tests/gpu.

    pytest -p helpers.pretend_gpu -m gpu tests/gpu/test_rows.py
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode

from engine import _native
from engine.ops import placement
from engine.ops.cuda.context import ExecutionContext
from engine.runner.decode_graphs import Captured
from helpers import triton_kernels  # before any kernel: they are interpreted
from helpers.cuda_host import emulated_ops

GIB = 1 << 30


class StayOnCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0].clone()
        if _is_gpu(kwargs.get("device")):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        kwargs.pop("out_dtype", None)  # of a product, which the CPU gives in the dtype of `out`
        return func(*("cpu" if _is_gpu(arg) else arg for arg in args), **kwargs)


def _is_gpu(device: Any) -> bool:
    return isinstance(device, str | torch.device) and str(device).startswith("cuda")


class Event:
    """Each is a millisecond later than the last."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.num_ms = 0.0

    def record(self) -> None:
        Event.now_ms = self.num_ms = getattr(Event, "now_ms", 0.0) + 1

    def synchronize(self) -> None: ...

    def elapsed_time(self, later: Event) -> float:
        return later.num_ms - self.num_ms


class Graph:
    """Replays nothing: what a function wrote while it was captured is what it would write."""

    def replay(self) -> None: ...


def capture() -> Any:
    return lambda run: Captured(run, run(), 0)


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    assert triton_kernels.DEVICE == "cpu", "there is a GPU"
    names = {
        "is_available": lambda: True,
        "synchronize": lambda: None,
        "get_device_capability": lambda: (9, 0),
        "get_device_name": lambda: "none",
        "mem_get_info": lambda: (79 * GIB, 80 * GIB),
        "device_count": lambda: 1,
        "get_device_properties": lambda index: types.SimpleNamespace(name="none", major=9, minor=0),
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": lambda *arguments, **options: contextlib.nullcontext(),
    }
    arrivals = property(lambda self: torch.zeros(1 << 16, dtype=torch.int32))
    with contextlib.ExitStack() as stack:
        for name, value in names.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch.version, "cuda", "13.0"))
        on_cpu = functools.partial(placement.on_gpu, device="cpu")
        stack.enter_context(mock.patch.object(placement, "on_gpu", on_cpu))
        stack.enter_context(mock.patch.object(ExecutionContext, "arrivals", arrivals))
        for module in [m for m in list(sys.modules.values()) if "cuda_capture" in vars(m)]:
            stack.enter_context(mock.patch.object(module, "cuda_capture", capture))
        stack.enter_context(mock.patch.object(_native, "cuda_is_compiled", lambda: True))
        stack.enter_context(mock.patch.object(_native, "num_cuda_devices", lambda: 1))
        stack.enter_context(emulated_ops())
        stack.enter_context(StayOnCpu())
        yield


@pytest.fixture(autouse=True)
def _pretended() -> Iterator[None]:
    with pretended():
        yield
