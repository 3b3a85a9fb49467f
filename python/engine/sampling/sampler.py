"""Draw the tokens of a step."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch

from engine.sampling.batch import SamplingBatch, SamplingTable
from engine.sampling.logprobs_mode import floored, reports_logits, reports_processed
from engine.scheduling.step_plan import Draw, StepResult

BITS_PER_WORD = 32


class Sampler:
    """Turns logits into tokens with one native call for the whole batch of at most `max_rows`."""

    def __init__(
        self, ops: ModuleType, ctx: Any, vocab_size: int, max_rows: int, *, logprobs_mode: str
    ) -> None:
        self._ops, self._ctx, self._mode = ops, ctx, logprobs_mode
        self._workspace = torch.empty(max_rows, vocab_size)
        self._table = SamplingTable(vocab_size, max_rows)
        self._batch: SamplingBatch | None = None
        """That of the last step, for the next one."""
        self._seen = torch.empty(max_rows, -(-vocab_size // BITS_PER_WORD), dtype=torch.int32)

    def sample(
        self, logits: torch.Tensor, draws: Sequence[Draw], bitmask: np.ndarray | None = None
    ) -> StepResult:
        """Shapes: `logits` float32 [R, V], one row for each of `draws`; `bitmask` as in the step plan.

        Effects: may change `logits`.
        """
        num_rows = len(draws)
        if num_rows == 0:
            return StepResult(np.empty(0, np.int32))
        requests = [draw.request for draw in draws]
        if self._batch is None or self._batch.requests != requests:
            self._batch = self._table.batch(requests)
        workspace, seen = self._workspace[:num_rows], self._seen[:num_rows]
        tensors = self._batch.tensors(draws, logits, workspace, seen, bitmask)
        tensors.reports_processed = reports_processed(self._mode)
        tensors.reports_logits = reports_logits(self._mode)
        self._ops.sample(self._ctx, tensors)
        token_ids = tensors.out_ids.numpy()
        if all(draw.request.params.logprobs is None for draw in draws):
            return StepResult(token_ids)
        return StepResult(
            token_ids,
            floored(tensors.out_logprobs.numpy()),
            tensors.top_ids.numpy(),
            floored(tensors.top_logprobs.numpy()),
        )
