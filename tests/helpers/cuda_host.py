"""The CUDA backend without a GPU: its native ops compiled for the CPU, with tests/cuda_host for CUDA."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

from engine import _native

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build-cuda-host"
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-U_FORTIFY_SOURCE"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
INCLUDES = [f"-I{ROOT / folder}" for folder in ("cpp", "cpp/include", "cuda", "tests/cuda_host")]
BINDING = ["cuda", "cuda_rows", "cuda_sampling", "errors", "tensor_caster"]


def sources() -> list[Path]:
    launchers = [path for path in (ROOT / "cuda").glob("*.cu") if path.name != "device.cu"]
    binding = [ROOT / f"cpp/binding/{name}.cc" for name in BINDING]
    ours = [*(ROOT / "cuda").glob("ops_*.cc"), *(ROOT / "tests/cuda_host").glob("*.cc")]
    checks = [ROOT / f"cpp/ops/{name}.cc" for name in ("sampling_args", "tensor_spec")]
    return sorted([*launchers, *binding, *ours, *checks])


def foreign_includes() -> list[str]:
    """Headers of Python, pybind11 (torch brings its own) and DLPack."""
    tvm = Path(importlib.util.find_spec("tvm_ffi").submodule_search_locations[0])
    headers = [sysconfig.get_path("include"), Path(torch.__file__).parent / "include", tvm / "include"]
    return [argument for folder in headers for argument in ("-isystem", str(folder))]


def compile_one(source: Path, key: str) -> Path:
    """The object file of one source; `key` tells states of all headers apart."""
    key = hashlib.sha256(key.encode() + source.read_bytes()).hexdigest()[:16]
    target = BUILD / f"{source.stem}-{key}.o"
    if not target.exists():
        for stale in BUILD.glob(f"{source.stem}-????????????????.o"):
            stale.unlink()
        options = [*FLAGS, "-DENGINE_SIMT_HOST", *WARNINGS, *INCLUDES, *foreign_includes()]
        command = ["g++", *options, "-x", "c++", "-c", str(source)]
        subprocess.run([*command, "-o", str(target) + ".part"], check=True)
        os.replace(str(target) + ".part", target)
    return target


@functools.cache
def emulated() -> ModuleType:
    """The module `_native.cuda`, of ops that take tensors of the CPU. Built at first use, kept in BUILD."""
    headers = [
        path for folder in ("cpp", "cuda", "tests/cuda_host") for path in (ROOT / folder).rglob("*.*h")
    ]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(headers))).hexdigest()
    key += sysconfig.get_config_var("EXT_SUFFIX") + torch.__version__
    BUILD.mkdir(exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        objects = [str(compile_one(source, key)) for source in sources()]
        name = hashlib.sha256(" ".join(objects).encode()).hexdigest()[:16]
        library = BUILD / f"cuda_host-{name}.so"
        if not library.exists():
            for stale in BUILD.glob("cuda_host-*.so"):
                stale.unlink()
            subprocess.run(["g++", "-shared", *objects, "-o", str(library) + ".part"], check=True)
            os.replace(str(library) + ".part", library)
    spec = importlib.util.spec_from_file_location("cuda_host", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class HostContext:
    """Stands for `engine.ops.cuda.context.ExecutionContext`."""

    isa, is_deterministic = "sm_90", False

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.arrivals = torch.zeros(4096, dtype=torch.int32, device=device)


@contextlib.contextmanager
def emulated_ops() -> Iterator[ModuleType]:
    """Within, `engine.ops.cuda` works on tensors of the CPU."""
    real, _native.cuda = _native.cuda, emulated()
    try:
        yield _native.cuda
    finally:
        _native.cuda = real
