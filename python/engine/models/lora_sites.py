"""Where adapters can add to a model: its linear layers as they are computed, fused ones as one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

EMBEDDING = 0
"""Number of the embedding's site; the head's is the last one."""


class Part(NamedTuple):
    """One module of the checkpoint, and the columns of the site's output that are its own."""

    name: str
    first_column: int
    num_columns: int


class Site(NamedTuple):
    """A layer with its parts in order of columns. The inputs of the embedding are token ids."""

    in_features: int
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, in_features: int, modules: Iterable[tuple[str, int]]) -> Site:
        """From (name, rows) of each module, one under the other."""
        parts, start = [], 0
        for name, rows in modules:
            parts.append(Part(name, start, rows))
            start += rows
        return cls(in_features, tuple(parts))
