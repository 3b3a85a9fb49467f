"""What an output consists of, piece by piece, as the parsers report it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Content:
    """More of the answer's text."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Reasoning:
    """More of the thoughts before the answer."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class CallStart:
    """A tool is called. `index` counts the calls that were started, from 0."""

    index: int
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the JSON text of a call's arguments, as the model wrote it."""

    index: int
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class CallEnd:
    """The call is complete: its arguments are a JSON object."""

    index: int


@dataclasses.dataclass(frozen=True, slots=True)
class CallRejected:
    """What began as this call is none; its text, as the model wrote it, follows as content."""

    index: int


Event = Content | Reasoning | CallStart | CallArguments | CallEnd | CallRejected
