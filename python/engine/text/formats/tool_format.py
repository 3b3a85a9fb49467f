"""What a format of tool calls is: its reader, and the words that a constraint makes the model write."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from engine.text.formats.reader import Reader, Steps

NAME = "NAME"
"""Stands for the tool's name in `begin`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolFormat:
    """One format. `read` reads a whole output: text and calls.

    A call is `begin`, arguments, `end`; several are `before`, calls with `between` them, `after`.
    `markers` are spellings that `read` looks for: where one is a special token of the vocabulary, it
    must not be hidden from the text. A vocabulary that has the first one has the format.

    `openings` are all the ways into calls from free text: behind one of them the text is held to the
    format, so `read` must take nothing for a call that no opening has begun. One with a name in it is
    all of a call up to its arguments; another one is a marker, behind which calls follow.
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
    closing: str = ""
    """Ends calls behind an opening that is a marker of its own, not part of how calls begin otherwise."""

    has_python_arguments: bool = False
    """Arguments are written key=value, each value in JSON."""

    def named_openings(self, names: Iterable[str]) -> list[str]:
        """The openings, with each of these names where one belongs."""
        names = sorted(names)
        return [
            opening.replace(NAME, name)
            for opening in self.openings
            for name in (names if NAME in opening else names[:1])
        ]

    def first_calls(self, names: Iterable[str]) -> list[str]:
        """How an answer that is nothing but calls begins, up to the arguments of the first."""
        return [(self.before + self.begin).replace(NAME, name) for name in sorted(names)]
