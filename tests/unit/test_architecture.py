"""ARCHITECTURE.md is true: its tree exists, and imports follow its table."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "engine"
TEXT = (ROOT / "ARCHITECTURE.md").read_text()
WITHOUT_TORCH = ("text", "config", "cache", "scheduling", "server")
HEAVY = ("torch", "transformers", "xgrammar")


def table() -> dict[str, int]:
    rows = re.findall(r"^\| (\d) \| (.+) \|$", TEXT, flags=re.MULTILINE)
    return {module: int(level) for level, modules in rows for module in modules.split(", ")}


def owner(module: str, levels: dict[str, int]) -> str | None:
    """The row of the table that covers a module: its longest listed prefix."""
    parts = module.split(".")
    for n in range(len(parts), 0, -1):
        if ".".join(parts[:n]) in levels:
            return ".".join(parts[:n])
    return None


def imports(path: Path) -> Iterator[str]:
    """Modules imported anywhere in a file, inside functions too, except for type checkers only."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def test_imports_run_downward():
    levels = table()
    wrong, sideways = [], set()
    for path in sources():
        name = module_name(path)
        if name.startswith("engine.demo"):
            continue
        mine = owner(name, levels)
        assert mine, f"{name} has no level in ARCHITECTURE.md"
        for imported in imports(path):
            if not imported.startswith("engine."):
                continue
            theirs = owner(imported, levels)
            if theirs is None or levels[theirs] > levels[mine]:
                wrong.append(f"{name} imports {imported}")
            elif levels[theirs] == levels[mine] and theirs != mine:
                sideways.add((mine, theirs))
    wrong += [f"{a} and {b} import each other" for a, b in sideways if (b, a) in sideways and a < b]
    assert not wrong, "\n".join(wrong)


def test_the_text_side_never_imports_torch():
    for path in sources():
        if path.relative_to(PACKAGE).parts[0] in WITHOUT_TORCH:
            heavy = [name for name in imports(path) if name.split(".")[0] in HEAVY]
            assert not heavy, f"{path.relative_to(ROOT)} imports {heavy}"


def test_the_tree_is_the_tree():
    listed = set(re.findall(r"^([a-z_/]+)/(?=\s|$)", TEXT, flags=re.MULTILINE))
    missing = [folder for folder in listed if not (ROOT / folder).is_dir()]
    assert not missing, f"ARCHITECTURE.md names folders that do not exist: {missing}"
    for top in ("python/engine", "cpp", "tests", "bench", "docs", "cuda"):
        for folder in filter(Path.is_dir, (ROOT / top).rglob("*")):
            has_code = any(p.suffix in (".py", ".cc", ".h", ".cu", ".md") for p in folder.iterdir())
            if has_code and folder.name != "model":
                name = folder.relative_to(ROOT).as_posix()
                assert name in listed, f"ARCHITECTURE.md does not list {name}"


def test_decision_pages_are_numbered_without_repeats():
    numbers = [page.name[:4] for page in (ROOT / "docs" / "decisions").iterdir()]
    assert len(numbers) == len(set(numbers)) > 0


def test_only_the_binding_knows_python():
    for path in [*(ROOT / "cpp").rglob("*.h"), *(ROOT / "cpp").rglob("*.cc")]:
        if path.relative_to(ROOT / "cpp").parts[0] != "binding":
            assert not re.search(r"#include [<\"](pybind11|Python\.h|torch|dlpack)", path.read_text()), path


def test_the_native_module_needs_no_torch():
    """Nothing of torch is linked, or imported by the way."""
    code = "import sys, engine._native; print('torch' in sys.modules, open('/proc/self/maps').read())"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.startswith("False") and "engine/_native" in shown
    assert not re.search(r"/lib(torch|c10)\w*\.so", shown)


def test_kernels_include_no_standard_library():
    allowed = {"stdint.h", "immintrin.h", "arm_neon.h"}
    for path in (ROOT / "cpp" / "cpu" / "kernels").iterdir():
        if path.name == "table.h":  # shared with the dispatcher: declarations only
            continue
        text = path.read_text()
        assert not set(re.findall(r"#include <(.+?)>", text)) - allowed, path
        assert "std::" not in text, path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import torch", ["torch"]),
        ("def f():\n    from engine.core import llm", ["engine.core.llm"]),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch", ["typing.TYPE_CHECKING"]),
    ],
)
def test_the_import_reader_itself(tmp_path, text, expected):
    path = tmp_path / "module.py"
    path.write_text(text)
    assert list(imports(path)) == expected
