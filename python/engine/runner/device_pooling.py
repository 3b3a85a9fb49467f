"""Hidden states of texts pooled where they lie, so that only what is left of each text leaves the GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from engine.models.embedding_head import EmbeddingHead
from engine.ops.transfer import fetch, send


class DevicePooling:
    """`models.embedding_head.PoolingBatch` on another device; dense layers and norms follow on the host.

    A text's rows are added one after the other, whoever shares the batch. Nothing but `vectors` waits.
    """

    def __init__(self, head: EmbeddingHead, lens: Sequence[int], device: torch.device) -> None:
        self._head, self._lens, self._device = head, np.asarray(lens), device
        shape = len(self._lens), head.hidden_size
        self._parts = [
            torch.full(shape, float("-inf") if mode == "max" else 0.0, device=device)
            for mode in head.spec.pooling
        ]
        self._fetched: Callable[[], list[np.ndarray]] | None = None

    def take(self, hidden: torch.Tensor, cu_rows: torch.Tensor, starts: torch.Tensor) -> None:
        """The next rows of each text. Shapes: `hidden` [T, hidden size] of any dtype on the device; `cu_rows`
        and `starts` as for `PoolingBatch`, on the host."""
        ends = cu_rows.numpy().astype(np.int64)
        counts, first = np.diff(ends), starts.numpy().astype(np.int64)
        places = np.arange(ends[-1]) + np.repeat(first - ends[:-1], counts) + 1
        begin_rows, end_rows, lengths, weights = send(
            [ends[:-1], ends[1:] - 1, counts, places.astype(np.float32)], self._device
        )
        rows = hidden.float()

        def joined(rows: torch.Tensor, how: str) -> torch.Tensor:
            return torch.segment_reduce(rows, how, lengths=lengths, unsafe=True)

        for mode, part in zip(self._head.spec.pooling, self._parts, strict=True):
            if mode == "last":
                part.copy_(rows.index_select(0, end_rows))
            elif mode == "cls":
                if not first.any():
                    part.copy_(rows.index_select(0, begin_rows))
            elif mode == "max":
                torch.maximum(part, joined(rows, "max"), out=part)
            else:
                part.add_(joined(rows * weights[:, None] if mode == "weighted_mean" else rows, "sum"))

    def send_home(self) -> None:
        """Start the copy to the host, when all rows were taken."""
        self._fetched = fetch(self._parts)

    def vectors(self) -> np.ndarray:
        """Float32 [B, size]; waits for the copy."""
        assert self._fetched is not None
        return self._head.vectors([torch.from_numpy(part) for part in self._fetched()], self._lens)
