"""Turn a step plan into the arrays that the model reads, once a step."""

from __future__ import annotations

import numpy as np
import torch

from engine.models.adapter_rows import number_adapters
from engine.models.decoder import DecoderInputs
from engine.ops.attention_plan import AttentionPlan
from engine.scheduling.step_plan import StepPlan


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

    def build(self, plan: StepPlan) -> DecoderInputs:
        """The inputs of one step; they are overwritten by the next call."""
        rows = plan.rows
        num_rows, num_tokens = len(rows), plan.num_tokens
        starts = np.fromiter((row.start for row in rows), np.int32, num_rows)
        counts = np.fromiter((row.num_tokens for row in rows), np.int32, num_rows)
        draws = np.fromiter((row.samples + row.num_drafts for row in rows), np.int32, num_rows)

        ends = np.cumsum(counts, out=self._cu_seqlens_q[1 : num_rows + 1])
        np.add(starts, counts, out=self._kv_lens[:num_rows])
        for index, row in enumerate(rows):
            request = row.request
            self._block_tables[index, : request.num_blocks] = request.block_table[: request.num_blocks]
        np.concatenate(
            [row.request.token_ids[row.start : row.start + row.num_tokens] for row in rows],
            out=self._token_ids[:num_tokens],
        )
        row_of_token = np.repeat(np.arange(num_rows), counts)
        positions = self._positions[:num_tokens]
        np.add(np.arange(num_tokens, dtype=np.int32), (starts - ends + counts)[row_of_token], out=positions)
        blocks, offsets = np.divmod(positions, self._block_size)
        slot_ids = self._slot_ids[:num_tokens]
        np.multiply(self._block_tables[row_of_token, blocks], self._block_size, out=slot_ids, dtype=np.int64)
        slot_ids += offsets
        last_draws = np.cumsum(draws)
        num_sampled = int(last_draws[-1])
        shifts = np.repeat(ends - last_draws, draws)  # from the number of a draw to its row
        np.add(np.arange(num_sampled), shifts, out=self._logit_rows[:num_sampled])
        num_wanted = num_sampled
        for row, end in zip(rows, ends, strict=True):
            if row.scored:
                shift = int(end) - row.num_tokens - row.start  # from the request's positions to the step's
                places = slice(num_wanted, num_wanted + len(row.scored))
                self._logit_rows[places] = np.arange(row.scored.start + shift, row.scored.stop + shift)
                num_wanted = places.stop

        lent = [None if row.request.adapter is None else row.request.adapter.weights for row in rows]
        adapters, adapter_of_row = number_adapters(lent)
        return DecoderInputs(
            token_ids=torch.from_numpy(self._token_ids[:num_tokens]),
            positions=torch.from_numpy(positions),
            slot_ids=torch.from_numpy(slot_ids),
            logit_rows=torch.from_numpy(self._logit_rows[:num_wanted]),
            num_scored=num_wanted - num_sampled,
            plan=AttentionPlan(
                cu_seqlens_q=torch.from_numpy(self._cu_seqlens_q[: num_rows + 1]),
                kv_lens=torch.from_numpy(self._kv_lens[:num_rows]),
                block_tables=torch.from_numpy(self._block_tables[:num_rows]),
            ),
            adapters=adapters,
            adapter_of_token=None if adapter_of_row is None else adapter_of_row[row_of_token],
        )
