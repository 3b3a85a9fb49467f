"""Hidden states of texts pooled where they lie, so that only what is left of each text leaves the GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from engine.models.embedding_head import POOL_MODES, EmbeddingHead
from engine.ops.cuda.pooling import pool
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
        are_first = not starts.any()
        cu_rows, starts = send([cu_rows.numpy(), starts.numpy()], self._device)
        for mode, part in zip(self._head.spec.pooling, self._parts, strict=True):
            if mode in POOL_MODES:
                pool(None, hidden, cu_rows, starts, POOL_MODES[mode], part)
            elif mode == "last":
                part.copy_(hidden.index_select(0, cu_rows[1:] - 1))
            elif are_first:  # cls
                part.copy_(hidden.index_select(0, cu_rows[:-1]))

    def send_home(self) -> None:
        """Start the copy to the host, when all rows were taken."""
        self._fetched = fetch(self._parts)

    def vectors(self) -> np.ndarray:
        """Float32 [B, size]; waits for the copy."""
        assert self._fetched is not None
        return self._head.vectors([torch.from_numpy(part) for part in self._fetched()], self._lens)
