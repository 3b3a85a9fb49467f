"""The programs of tests/cpp: native code without Python, built here from what they include."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted((ROOT / "tests" / "cpp").glob("test_*.cc"))
FLAGS = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-D_GLIBCXX_ASSERTIONS", "-pthread"]
INCLUDES = [f"-I{ROOT / 'cpp'}", f"-I{ROOT / 'cpp' / 'include'}"]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_program(program: Path, tmp_path: Path) -> None:
    """Without sanitizers, which CONTRIBUTING.md has a command for: those make of seconds a minute."""
    stems = re.findall(r'^#include "((?:cache|cpu)/\w+)\.h"', program.read_text(), re.MULTILINE)
    sources = [str(path) for stem in stems for path in sorted((ROOT / "cpp").glob(f"{stem}*.cc"))]
    assert sources
    built = str(tmp_path / program.stem)
    subprocess.run(["g++", *FLAGS, *INCLUDES, str(program), *sources, "-o", built], check=True)
    subprocess.run([built], check=True)
