"""What the ops of one engine share on its GPU."""

from __future__ import annotations

import functools
from typing import Any

import torch


class ExecutionContext:
    """Stands where the context of the CPU's kernels stands; streams and memory belong to torch.

    `is_deterministic` asks for products and attention whose bits for a row do not depend on its batch.
    """

    kernel_seconds = 0.0, 0.0
    """No CPU time goes to kernels."""

    def __init__(self, num_threads: int = 1, isa: str = "auto", *, is_deterministic: bool = False) -> None:
        major, minor = torch.cuda.get_device_capability()
        self.isa = f"sm_{major}{minor}"
        self.num_threads, self.is_deterministic = num_threads, is_deterministic

    @functools.cached_property
    def arrivals(self) -> torch.Tensor:
        """int32, zeros between launches: decode attention counts in it which splits of a row are done.

        Enough for 8,192 rows of a model with 128 query heads. Every launch uses it, so that it must be
        asked for before a graph is captured, as running a step does.
        """
        return torch.zeros(1 << 20, dtype=torch.int32, device="cuda")

    def report_to(self, board: Any) -> None:
        """Nothing to report: steps on a GPU are short, and the turns of the engine's loop tell enough."""

    @property
    def is_lost(self) -> bool:
        """Whether the GPU refuses all further work of this process, as it does after a fault in a kernel or
        in its memory. Effects: waits for what was launched."""
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False
