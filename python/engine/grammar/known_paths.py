"""What comes where answers to a grammar have been before.

Answers to one schema go through the same places: what differs are the insides of strings. So what a grammar
forces and allows behind a token is remembered from the second time on, and an answer on a known path need not
tell xgrammar's matcher, until it leaves the path.

Places are told apart by the text that leads there. Within a string of known bounds nothing counts but the
number of its characters: the string is one place, from which what closes it leads on.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

if TYPE_CHECKING:
    from engine.grammar.compiler import CompiledGrammar

MAX_BYTES = 16 * 2**20
"""Of all paths of a vocabulary's grammars; beyond it all are forgotten. Each is known again when answers have
taken it twice."""
MAX_NEW = 64
"""Passages that one answer may add: free text, which nobody repeats, would drive out what is of use."""

_BYTES_EACH = 500
"""Of a passage and the waypoint behind it, and of a situation beside its mask."""


class Situation(NamedTuple):
    """All that a matcher knows somewhere, but for the state of the library's."""

    text: bytes
    """Of the tokens that are forced there."""
    forced: tuple[int, ...]
    has_ended: bool
    held: int | None
    is_open: bool
    mask: np.ndarray
    string: tuple | None
    match_s: float
    """What the library's matcher took to come there from the waypoint before."""


class Waypoint:
    """A place where an answer has been: in a string, or right behind a text.

    `string` is the waypoint of the last string before, by its number, and `text` what came since its closing
    quote, which is the first byte.
    """

    __slots__ = ("number", "passages", "string", "text")

    def __init__(self, number: int, string: int, text: bytes) -> None:
        self.number, self.string, self.text = number, string, text
        self.passages: dict[Hashable, Passage] = {}


class Passage:
    """What lies behind a token. The situation is known once a second answer has gone there.

    It leads to a waypoint, or, if that is None, stays in the same string.
    """

    __slots__ = ("situation", "to")

    def __init__(self, to: Waypoint | None) -> None:
        self.to = to
        self.situation: Situation | None = None


class Paths:
    """Those of the answers to a grammar, if certain tokens end them."""

    def __init__(self, store: KnownPaths) -> None:
        self._store = store
        self._waypoints: dict[Hashable, Waypoint] = {}
        self._num_made = 0
        self.start = Waypoint(0, 0, b"")
        self.situation: Situation | None = None
        """At the start."""

    def add(self, waypoint: Waypoint, key: Hashable, to: Waypoint | None) -> None:
        """A passage."""
        waypoint.passages[key] = Passage(to)
        self._store.take(_BYTES_EACH)

    def waypoint(self, string: int, text: bytes, kind: Hashable) -> Waypoint:
        """`kind` tells strings from other places."""
        key = string, text, kind
        found = self._waypoints.get(key)
        if found is None:
            self._num_made += 1
            found = self._waypoints[key] = Waypoint(self._num_made, string, text)
            self._store.take(_BYTES_EACH + 2 * len(text))
        return found

    def seen(self, situation: Situation) -> Situation:
        """What is to be remembered."""
        num_bytes = 2 * situation.mask.nbytes + len(situation.text) + 8 * len(situation.forced)
        self._store.take(_BYTES_EACH + num_bytes)  # a string may keep a mask, too
        return situation

    def forget(self) -> None:
        """All but where answers are. Numbers are not given again, for these may go on from there."""
        for waypoint in self._waypoints.values():
            waypoint.passages.clear()
        self._waypoints.clear()
        self.start.passages.clear()
        self.situation = None


class KnownPaths:
    """The paths of all grammars of a vocabulary. They belong to the engine's thread."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._paths: WeakKeyDictionary[CompiledGrammar, dict[tuple[int, ...], Paths]] = WeakKeyDictionary()

    def of(self, grammar: CompiledGrammar, end_ids: tuple[int, ...]) -> Paths:
        by_end = self._paths.setdefault(grammar, {})
        if end_ids not in by_end:
            by_end[end_ids] = Paths(self)
            self.take(_BYTES_EACH)
        return by_end[end_ids]

    def take(self, num_bytes: int) -> None:
        """Count what is kept. Answers under way go on from where they are, if all is forgotten."""
        self._num_bytes += num_bytes
        if self._num_bytes > self._max_bytes:
            for by_end in self._paths.values():
                for paths in by_end.values():
                    paths.forget()
            self._paths.clear()
            self._num_bytes = 0
