"""How often a process looks for garbage that only the collector finds."""

from __future__ import annotations

import gc

_YOUNG_OBJECTS = 10_000
"""New containers between two looks at the young ones. Requests leave hardly a cycle behind."""


def spare_what_lives() -> None:
    """To be called when a process is ready: what it has made by then lives on, and is not looked through."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS)
