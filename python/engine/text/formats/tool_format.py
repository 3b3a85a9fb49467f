"""What a format of tool calls is: its reader, and the words that a constraint makes the model write."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from engine.text.formats.reader import Reader, Steps

NAME = "NAME"
"""Stands for the tool's name in `begin`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolFormat:
    """One format. `read` reads a whole output: text and calls.

    A call is `begin`, arguments, `end`; several are `before`, calls with `between` them, `after`.
    `markers` are spellings that `read` looks for: where one is a special token of the vocabulary, it
    must not be hidden from the text. A vocabulary that has the first one has the format. `openings` are
    beginnings of a call (with the tool's name in them) that show up in free text; without any, `before`
    shows that calls begin.
    """

    name: str
    read: Callable[[Reader], Steps[None]]
    markers: tuple[str, ...]
    begin: str
    end: str
    before: str = ""
    between: str = ""
    after: str = ""
    openings: tuple[str, ...] = ()
    has_python_arguments: bool = False
    """Arguments are written key=value, each value in JSON."""
