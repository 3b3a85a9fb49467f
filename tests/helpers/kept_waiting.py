"""How long processes could have run while others had the cores: no fault of theirs, on a busy machine."""

from __future__ import annotations

import contextlib
from pathlib import Path


def kept_waiting_s(*pids: int) -> float:
    """Seconds since they began, the sum over all their threads; of one that is gone nothing."""
    waited_ns = 0
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    waited_ns += int((thread / "schedstat").read_text().split()[1])
    return waited_ns / 1e9
