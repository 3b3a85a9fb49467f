"""The engine stays as small as docs/decisions/0021 says, part by part."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "engine"
PAGE = (ROOT / "docs" / "decisions" / "0021-how-large-the-engine-may-be.md").read_text()
NO_PACKAGE = "modules of no package"
MOST_NATIVE_LINES, MOST_FILE_LINES = 13_000, 500
NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)


def code_lines(text: str) -> int:
    """Lines that hold code: no blank one, and none that is all comment or docstring."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (*NO_CODE, tokenize.ENDMARKER):
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def native_files() -> list[Path]:
    return [path for name in ("cpp", "cuda") for path in (ROOT / name).rglob("*") if path.is_file()]


def test_lines_of_code_are_counted() -> None:
    text = '"""What for."""\n\n# why\nx = 1  # one\n\n'
    text += 'def f():\n    """Two\n    lines."""\n    return """a\nb"""\n'
    assert code_lines(text) == 4


def test_no_part_is_larger_than_was_decided() -> None:
    rows = re.findall(r"^\| [^|]+ \| ([\w ,]+) \| ([\d,]+) \|$", PAGE, flags=re.MULTILINE)
    bounds = {frozenset(packages.split(", ")): int(most.replace(",", "")) for packages, most in rows}
    counts: Counter[str] = Counter()
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).parts
        counts[parts[0] if len(parts) > 1 else NO_PACKAGE] += code_lines(path.read_text())
    assert sorted(counts) == sorted(name for packages in bounds for name in packages)
    for packages, most in bounds.items():
        found = sum(counts[name] for name in packages)
        assert found <= most, f"{', '.join(sorted(packages))}: {found} lines of code, and {most} are allowed"


def test_native_code_is_as_small_as_was_meant() -> None:
    assert 0 < sum(len(path.read_text().splitlines()) for path in native_files()) <= MOST_NATIVE_LINES


def test_a_file_is_one_idea() -> None:
    for path in [*PACKAGE.rglob("*.py"), *native_files()]:
        assert len(path.read_text().splitlines()) <= MOST_FILE_LINES, path
