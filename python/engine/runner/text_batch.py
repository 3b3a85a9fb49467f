"""Where the tokens of a batch of texts lie: packed without padding, each text in blocks of its own."""

from __future__ import annotations

import numpy as np
import torch

from engine.ops.attention_plan import AttentionPlan


class TextBatch:
    """Texts of `lens` tokens (int64 [B]), whole or in pieces that follow one another."""

    def __init__(self, lens: np.ndarray, block_size: int, *, is_causal: bool) -> None:
        self._block_size = block_size
        self._is_causal = is_causal
        num_blocks = -(-lens // block_size)
        firsts = np.cumsum(num_blocks) - num_blocks
        # Entries beyond a text's blocks are never read.
        self._block_tables = (firsts[:, None] + np.arange(num_blocks.max())).astype(np.int32)

    def piece(
        self, starts: np.ndarray, counts: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor, AttentionPlan]:
        """Positions int32 [T], slots int64 [T], and the plan, of `counts` tokens of each text from position
        `starts` on (both int64 [B])."""
        cu_seqlens = np.concatenate([[0], np.cumsum(counts)])
        text_of_row = np.repeat(np.arange(len(counts)), counts)
        positions = np.arange(cu_seqlens[-1]) - (cu_seqlens[:-1] - starts)[text_of_row]
        blocks, offsets = np.divmod(positions, self._block_size)
        slot_ids = self._block_tables[text_of_row, blocks].astype(np.int64) * self._block_size + offsets
        plan = AttentionPlan(
            cu_seqlens_q=torch.from_numpy(cu_seqlens.astype(np.int32)),
            kv_lens=torch.from_numpy((starts + counts).astype(np.int32)),
            block_tables=torch.from_numpy(self._block_tables),
            is_causal=self._is_causal,
        )
        return torch.from_numpy(positions.astype(np.int32)), torch.from_numpy(slot_ids), plan
