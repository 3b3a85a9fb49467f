"""Turn a step plan into the arrays that the model reads, once a step."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from engine.models.adapter_rows import number_adapters
from engine.models.decoder import DecoderInputs
from engine.ops.attention_plan import AttentionPlan
from engine.scheduling.step_plan import StepPlan

MOST_CUTS = 256
"""That are kept; some kilobytes each."""


class BatchInputs:
    """Builds `DecoderInputs` in buffers that are allocated once for the largest step.

    `max_tokens` and `max_rows` bound a step, `max_positions` the known tokens of one request.
    """

    def __init__(self, *, max_tokens: int, max_rows: int, max_positions: int, block_size: int) -> None:
        self._block_size = block_size
        self._token_ids = np.empty(max_tokens, np.int32)
        self._positions = np.empty(max_tokens, np.int32)
        self._slot_ids = np.empty(max_tokens, np.int64)
        self._logit_rows = np.empty(max_tokens, np.int64)
        self._cu_seqlens_q = np.zeros(max_rows + 1, np.int32)
        self._kv_lens = np.empty(max_rows, np.int32)
        self._block_tables = np.zeros((max_rows, -(-max_positions // block_size)), np.int32)
        self._cuts: dict[tuple[int, int, int, int], DecoderInputs] = {}
        self._num_tokens = 0

    @property
    def last_slot_id(self) -> int:
        """The largest of the slots that the step writes to."""
        return int(np.maximum.reduce(self._slot_ids[: self._num_tokens]))

    def build(self, plan: StepPlan) -> DecoderInputs:
        """The inputs of one step; they are overwritten by the next call.

        Most rows have one token: plain numbers cost less than operations on arrays do.
        """
        rows, size = plan.rows, self._block_size
        token_ids, positions, slot_ids = self._token_ids, self._positions, self._slot_ids
        ends: list[int] = []
        kv_lens: list[int] = []
        logit_rows: list[int] = []
        end = 0
        for index, row in enumerate(rows):
            request, start, first = row.request, row.start, end
            end = first + row.num_tokens
            table = request.block_table[: request.num_blocks]
            self._block_tables[index, : request.num_blocks] = table
            if row.num_tokens == 1:
                token_ids[first], positions[first] = request.token_ids[start], start
                slot_ids[first] = int(table[start // size]) * size + start % size
            else:
                chunk = np.arange(start, start + row.num_tokens)
                token_ids[first:end] = request.token_ids[start : start + row.num_tokens]
                positions[first:end] = chunk
                slot_ids[first:end] = table[chunk // size] * np.int64(size) + chunk % size
            ends.append(end)
            kv_lens.append(start + row.num_tokens)
            logit_rows.extend(range(end - row.num_draws, end))
        num_rows, num_tokens, num_sampled = len(rows), end, len(logit_rows)
        self._num_tokens = num_tokens
        for row, end in zip(rows, ends, strict=True):
            if row.scored:
                shift = end - row.num_tokens - row.start  # from the request's positions to the step's
                logit_rows.extend(range(row.scored.start + shift, row.scored.stop + shift))
        num_wanted = len(logit_rows)
        self._cu_seqlens_q[1 : num_rows + 1] = ends
        self._kv_lens[:num_rows] = kv_lens
        self._logit_rows[:num_wanted] = logit_rows

        lent = [None if row.request.adapter is None else row.request.adapter.weights for row in rows]
        adapters, adapter_of_row = number_adapters(lent)
        inputs = self._cut(num_rows, num_tokens, num_wanted, num_wanted - num_sampled)
        if adapter_of_row is None:
            return inputs
        adapter_of_token = np.repeat(adapter_of_row, [row.num_tokens for row in rows])
        return dataclasses.replace(inputs, adapters=adapters, adapter_of_token=adapter_of_token)

    def _cut(self, num_rows: int, num_tokens: int, num_wanted: int, num_scored: int) -> DecoderInputs:
        """The buffers as a step of this size sees them, the same object for the same size: to cut them costs
        more than to fill them."""
        size = num_rows, num_tokens, num_wanted, num_scored
        if size not in self._cuts:
            if len(self._cuts) == MOST_CUTS:
                self._cuts.clear()
            self._cuts[size] = DecoderInputs(
                token_ids=torch.from_numpy(self._token_ids[:num_tokens]),
                positions=torch.from_numpy(self._positions[:num_tokens]),
                slot_ids=torch.from_numpy(self._slot_ids[:num_tokens]),
                logit_rows=torch.from_numpy(self._logit_rows[:num_wanted]),
                num_scored=num_scored,
                plan=AttentionPlan(
                    cu_seqlens_q=torch.from_numpy(self._cu_seqlens_q[: num_rows + 1]),
                    kv_lens=torch.from_numpy(self._kv_lens[:num_rows]),
                    block_tables=torch.from_numpy(self._block_tables[:num_rows]),
                ),
            )
        return self._cuts[size]
