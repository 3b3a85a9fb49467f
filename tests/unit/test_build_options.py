"""What CMakeLists.txt makes of its options. Needs cmake."""

from __future__ import annotations

import subprocess
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
