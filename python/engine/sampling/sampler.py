"""Draw the tokens of a step."""

from __future__ import annotations

import dataclasses
import functools
from types import ModuleType
from typing import Any

import numpy as np
import torch

from engine.ops.placement import CPU, Placement
from engine.ops.sampling import SamplingTensors
from engine.ops.transfer import fetch, send
from engine.sampling.batch import SamplingTable
from engine.sampling.drawn_ids import DrawnIds, LateIds
from engine.sampling.logprobs_mode import floored, reports_logits, reports_processed
from engine.scheduling.step_plan import StepPlan, StepResult, Wait

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
        num_words = -(-vocab_size // BITS_PER_WORD)
        self.drawn = DrawnIds()
        """What the last step drew; on a GPU only."""
        workspace = torch.empty(max_rows, vocab_size, device=placement.device)
        seen = torch.empty(max_rows, num_words, dtype=torch.int32, device=placement.device)
        self._table = SamplingTable(max_rows, workspace, seen, is_host=placement.is_host)

    def launch(self, logits: torch.Tensor, plan: StepPlan) -> Wait:
        """Start to draw the tokens of a step; what waits for them.

        Shapes: `logits` float32 [R, V], one row for each of the plan's draws.
        Effects: may change `logits`.
        """
        draws = plan.draws
        if not draws:
            return lambda: StepResult(np.empty(0, np.int32))
        tensors = self._table.tensors(draws, logits, plan.bitmask)
        is_host = self._placement.is_host
        tensors.reports_processed = reports_processed(self._mode)
        tensors.reports_logits = reports_logits(self._mode)
        if not is_host:
            tensors = _sent(tensors, self._placement.device, self._late_ids(tensors, plan))
            self.drawn.keep(draws, tensors.out_ids)
        self._ops.sample(self._ctx, tensors)
        results = [tensors.out_ids]
        if any([draw.request.params.logprobs is not None for draw in draws]):
            results += [tensors.out_logprobs, tensors.top_ids, tensors.top_logprobs]
        elif is_host:
            return functools.partial(StepResult, tensors.out_ids)
        fetched = functools.partial(map, np.asarray, results) if is_host else fetch(results)

        def wait() -> StepResult:
            token_ids, *scores = fetched()
            if not scores:
                return StepResult(token_ids)
            logprobs, top_ids, top_logprobs = scores
            return StepResult(token_ids, floored(logprobs), top_ids, floored(top_logprobs))

        return wait

    def _late_ids(self, tensors: SamplingTensors, plan: StepPlan) -> LateIds | None:
        """The last of the known tokens that count for penalties, of rows for which it is being drawn.

        A plan with such rows has no drafts: each of its sampled rows is one row here.
        """
        looks = self._table.looks_back()
        if not any(looks):
            return None
        rows = [i for i, row in enumerate(plan.sampled_rows) if row.is_ahead and looks[i]]
        ends = tensors.token_indptr.numpy()[1:]
        return self.drawn.late([plan.sampled_rows[i].request for i in rows], ends[rows] - 1)


_LARGE = frozenset({"logits", "workspace", "seen"})
"""What is on the device already."""


def _sent(tensors: SamplingTensors, device: torch.device, late: LateIds | None) -> SamplingTensors:
    """The same with all that is small on the device, in one copy; the room for results is part of it."""
    small = {
        field.name: tensor
        for field in dataclasses.fields(tensors)
        if field.name not in _LARGE and isinstance(tensor := getattr(tensors, field.name), torch.Tensor)
    }
    arrays = [tensor.numpy() for tensor in small.values()]
    sent = send(arrays if late is None else [*arrays, late.places, late.rows], device)
    placed = dataclasses.replace(tensors, **dict(zip(small, sent, strict=False)))
    if late is not None:
        late.put(placed.token_ids, *sent[-2:])
    return placed
