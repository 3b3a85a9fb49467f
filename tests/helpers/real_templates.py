"""Chat templates of real models against the table in docs/tools-and-thoughts.md.

    PYTHONPATH=python:tests python -m helpers.real_templates DIRECTORY

DIRECTORY holds *.jinja files, for instance models/templates of llama.cpp. Each of them must be in the
table, by its hash, with the formats that are found in it now. With --print the rows are printed instead.
"""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

from engine.text.chat_template import ChatTemplate
from engine.text.formats.detect import choose_formats

TABLE = Path(__file__).parents[2] / "docs" / "tools-and-thoughts.md"
_ROW = re.compile(r"^\| (\S+) \| (\S+) \| (\S+) \| `([0-9a-f]{64})` \|$", re.MULTILINE)


def row(path: Path) -> tuple[str, str, str, str]:
    """Name, format of calls, format of thoughts, hash."""
    source = path.read_bytes()
    formats = choose_formats(ChatTemplate(source.decode(), {"bos_token": "<s>", "eos_token": "</s>"}))
    return (
        path.stem,
        "–" if formats.tools is None else formats.tools.name,
        "–" if formats.thoughts is None else formats.thoughts.name,
        hashlib.sha256(source).hexdigest(),
    )


def main(directory: str, *options: str) -> int:
    rows = [row(path) for path in sorted(Path(directory).glob("*.jinja"))]
    if "--print" in options:
        for name, tools, thoughts, digest in rows:
            print(f"| {name} | {tools} | {thoughts} | `{digest}` |")
        return 0
    known = {digest: found for _, *found, digest in _ROW.findall(TABLE.read_text(encoding="utf-8"))}
    wrong = [(name, *found) for name, *found, digest in rows if known.get(digest) != found]
    for found in wrong:
        print("not as in the table:", *found)
    print(f"{len(rows) - len(wrong)} of {len(rows)} templates are as in the table of {len(known)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
