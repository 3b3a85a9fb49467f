"""What CMakeLists.txt makes of its options. Needs cmake, and the package ziglang for AArch64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("value", ["off", "0", "FALSE", "banana", "OFFLINE"])
def test_no_other_word_is_taken_for_auto(tmp_path: Path, value: str) -> None:
    process = subprocess.run(
        ["cmake", "-S", str(ROOT), "-B", str(tmp_path), f"-DENGINE_CUDA={value}"],
        capture_output=True,
        text=True,
    )
    assert process.returncode != 0
    assert f"ENGINE_CUDA must be AUTO, ON or OFF, got '{value}'" in process.stderr


@pytest.mark.slow
def test_native_core_compiles_for_aarch64_without_warnings(tmp_path: Path) -> None:
    import pybind11  # only where the package was built without isolation

    compiler = f"{sys.executable} -m ziglang c++ -target aarch64-linux-gnu"
    options = ["-DENGINE_CUDA=OFF", "-DENGINE_WARNINGS_AS_ERRORS=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    options += ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"]
    options += [f"-DCMAKE_PREFIX_PATH={pybind11.get_cmake_dir()}"]
    configure = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), *options]
    build = ["cmake", "--build", str(tmp_path), "--target", "engine_core"]
    for command in (configure, build):
        subprocess.run(command, env={**os.environ, "CXX": compiler}, check=True)
    kernels = list(tmp_path.glob("CMakeFiles/kernels_neon.dir/**/*.o"))
    assert len(kernels) == len(list(ROOT.glob("cpp/cpu/kernels/*.cc")))
    machine = {kernel.read_bytes()[18] for kernel in kernels}
    assert machine == {183}  # EM_AARCH64
