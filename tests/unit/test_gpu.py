"""Why there is no usable GPU is said in one line, before anything is loaded."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from engine import _native
from engine.errors import ConfigError
from engine.ops import cuda
from engine.runner.gpu import Gpu

GIB = 2**30


@pytest.fixture
def machine(monkeypatch):
    """One that has everything; a test takes something away."""
    monkeypatch.setattr(_native, "cuda_is_compiled", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70 * GIB, 80 * GIB))
    found = SimpleNamespace(name="NVIDIA Test", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    return monkeypatch


def test_what_is_there(machine):
    assert Gpu.this() == Gpu("NVIDIA Test", (9, 0), 80 * GIB, 70 * GIB)


def busy():
    raise RuntimeError("CUDA error: all devices are busy\nCompile with TORCH_USE_CUDA_DSA")


@pytest.mark.parametrize(
    ("owner", "name", "value", "message"),
    [
        (_native, "cuda_is_compiled", lambda: False, "this build has no CUDA kernels"),
        (importlib.util, "find_spec", lambda name: None, "needs Triton"),
        (torch.version, "cuda", None, "the installed torch is built without CUDA"),
        (torch.cuda, "is_available", lambda: False, "the driver shows this process no NVIDIA GPU"),
        (torch.cuda, "mem_get_info", busy, "the GPU cannot be used: CUDA error: all devices are busy"),
        (
            torch.cuda,
            "get_device_properties",
            lambda index: SimpleNamespace(name="NVIDIA Old", major=7, minor=5),
            "NVIDIA Old is too old: its compute capability is below 8.0",
        ),
    ],
)
def test_what_is_missing(machine, owner, name, value, message):
    machine.setattr(owner, name, value)
    with pytest.raises(ConfigError, match=f"^--device cuda:? {message}") as caught:
        Gpu.this()
    assert "\n" not in caught.value.message


def test_every_op_of_the_backend_is_there():
    for name in cuda.__all__:
        assert getattr(cuda, name).__module__.startswith("engine.ops.cuda")


def test_what_a_closed_engine_left_with_torch_is_free(machine):
    kept = [30 * GIB]
    machine.setattr(torch.cuda, "empty_cache", kept.clear)
    machine.setattr(torch.cuda, "mem_get_info", lambda: (70 * GIB - sum(kept), 80 * GIB))
    assert Gpu.this().free_bytes == 70 * GIB
