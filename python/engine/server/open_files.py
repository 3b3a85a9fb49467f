"""How many connections the system lets this process keep open, so that none more are taken than can be."""

from __future__ import annotations

import dataclasses
import resource
import sys

_BACKLOG = 1024
_OTHERS = 128
"""Descriptors that are no connection: the listener, the engine's socket, files that are being read."""


@dataclasses.dataclass(frozen=True)
class Room:
    """For `connections` that are counted, and a `backlog` of those that the loop takes in one turn."""

    connections: int
    backlog: int


def room_for(wanted: int) -> Room:
    """Room for at most `wanted` connections: less where the hard limit on open files is lower than they need.

    Effects: raises the soft limit of this process as far as that takes.
    """
    soft, hard = map(_as_number, resource.getrlimit(resource.RLIMIT_NOFILE))
    needed = wanted + _BACKLOG + _OTHERS
    if soft < min(needed, hard):
        soft = min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    if needed <= soft:
        return Room(wanted, _BACKLOG)
    rest = soft - min(_OTHERS, soft // 2)
    backlog = max(1, min(_BACKLOG, rest // 4))
    return Room(max(1, min(wanted, rest - backlog)), backlog)


def _as_number(limit: int) -> int:
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit
