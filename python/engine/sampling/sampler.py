"""Draw the tokens of a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch

from engine.ops.placement import CPU, Placement
from engine.ops.sampling import SamplingTensors
from engine.ops.transfer import send
from engine.sampling.batch import SamplingBatch, SamplingTable
from engine.sampling.logprobs_mode import floored, reports_logits, reports_processed
from engine.scheduling.step_plan import Draw, StepResult

BITS_PER_WORD = 32


class Sampler:
    """Turns logits into tokens with one native call for the whole batch of at most `max_rows`."""

    def __init__(
        self,
        ops: ModuleType,
        ctx: Any,
        vocab_size: int,
        max_rows: int,
        *,
        logprobs_mode: str,
        placement: Placement = CPU,
    ) -> None:
        self._ops, self._ctx, self._mode, self._placement = ops, ctx, logprobs_mode, placement
        self._workspace = torch.empty(max_rows, vocab_size, device=placement.device)
        self._table = SamplingTable(vocab_size, max_rows)
        self._batch: SamplingBatch | None = None
        """That of the last step, for the next one."""
        num_words = -(-vocab_size // BITS_PER_WORD)
        self._seen = torch.empty(max_rows, num_words, dtype=torch.int32, device=placement.device)

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
        if not self._placement.is_host:
            tensors = _sent(tensors, self._placement.device)
        self._ops.sample(self._ctx, tensors)
        token_ids = tensors.out_ids.cpu().numpy()
        if all(draw.request.params.logprobs is None for draw in draws):
            return StepResult(token_ids)
        return StepResult(
            token_ids,
            floored(tensors.out_logprobs.cpu().numpy()),
            tensors.top_ids.cpu().numpy(),
            floored(tensors.top_logprobs.cpu().numpy()),
        )


_LARGE = frozenset({"logits", "workspace", "seen"})
"""What is on the device already."""


def _sent(tensors: SamplingTensors, device: torch.device) -> SamplingTensors:
    """The same with all that is small on the device, in one copy; the room for results is part of it."""
    small = {
        field.name: tensor
        for field in dataclasses.fields(tensors)
        if field.name not in _LARGE and isinstance(tensor := getattr(tensors, field.name), torch.Tensor)
    }
    sent = send([tensor.numpy() for tensor in small.values()], device)
    return dataclasses.replace(tensors, **dict(zip(small, sent, strict=True)))
