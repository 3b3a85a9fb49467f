"""A decoder as an embedder, beside generation on the same weights or alone."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import torch

from engine.core.messages import EmbeddingInfo
from engine.models.decoder import Decoder, DecoderInputs
from engine.models.embedding_head import EmbeddingHead
from engine.models.spec import ModelSpec
from engine.ops.attention_plan import AttentionPlan
from engine.runner.kv_cache import KVCache


class DecoderEmbedder:
    """Implements `core.embedding_core.Embedder`.

    A batch of up to `max_tokens` tokens is one step; a longer text is computed in chunks of as many, cut
    at the same places whatever else there is. Keys and values live in blocks of its own, so that no text
    waits for blocks that generation holds, and for no longer than a batch.
    Cost: the memory of as many blocks as the largest batch so far had, at most those of `max_len` tokens or
    of `max_tokens` texts of one block.
    """

    def __init__(
        self,
        decoder: Decoder,
        spec: ModelSpec,
        head: EmbeddingHead,
        *,
        dtype: str,
        block_size: int,
        max_tokens: int,
        max_len: int,
    ) -> None:
        pooling = "+".join(head.spec.pooling)
        self.info = EmbeddingInfo(head.size, max_len, spec.vocab_size, pooling, head.spec.is_normalized)
        self.max_step_tokens = max_tokens
        self._decoder = decoder
        self._head = head
        self._block_size = block_size
        num_blocks = max(max_tokens, -(-max_len // block_size))
        cache = KVCache(spec, num_blocks=num_blocks, block_size=block_size, dtype=getattr(torch, dtype))
        self._kv_layers = cache.layers

    def compute(self, texts: list[np.ndarray]) -> Generator[None, None, np.ndarray]:
        """Vectors float32 [texts, size]; yields between two chunks."""
        lens = np.array([len(text) for text in texts])
        pooling = self._head.start(lens)
        block_tables = self._block_tables(lens)
        token_ids = np.concatenate(texts)
        for start in range(0, len(token_ids), self.max_step_tokens):
            # More than one chunk only where a text is alone.
            chunk = token_ids[start : start + self.max_step_tokens]
            counts = lens if len(texts) > 1 else np.array([len(chunk)])
            starts = np.full(len(texts), start)
            inputs = self._inputs(chunk, starts, counts, block_tables)
            hidden = self._decoder.forward(inputs, self._kv_layers)
            pooling.take(hidden, inputs.plan.cu_seqlens_q, torch.from_numpy(starts.astype(np.int32)))
            if start + len(chunk) < len(token_ids):
                yield
        return pooling.vectors()

    def _block_tables(self, lens: np.ndarray) -> np.ndarray:
        """Int32 [B, most blocks of a text]; entries beyond a text's blocks are never read."""
        num_blocks = -(-lens // self._block_size)
        firsts = np.cumsum(num_blocks) - num_blocks
        return (firsts[:, None] + np.arange(num_blocks.max())).astype(np.int32)

    def _inputs(
        self, token_ids: np.ndarray, starts: np.ndarray, counts: np.ndarray, block_tables: np.ndarray
    ) -> DecoderInputs:
        """Every row is wanted, and none draws a token."""
        cu_seqlens = np.concatenate([[0], np.cumsum(counts)])
        text_of_row = np.repeat(np.arange(len(counts)), counts)
        positions = np.arange(len(token_ids)) - cu_seqlens[text_of_row] + starts[text_of_row]
        blocks, offsets = np.divmod(positions, self._block_size)
        slot_ids = block_tables[text_of_row, blocks].astype(np.int64) * self._block_size + offsets
        return DecoderInputs(
            token_ids=torch.from_numpy(token_ids.astype(np.int32)),
            positions=torch.from_numpy(positions.astype(np.int32)),
            slot_ids=torch.from_numpy(slot_ids),
            logit_rows=torch.arange(len(token_ids)),
            plan=AttentionPlan(
                cu_seqlens_q=torch.from_numpy(cu_seqlens.astype(np.int32)),
                kv_lens=torch.from_numpy((starts + counts).astype(np.int32)),
                block_tables=torch.from_numpy(block_tables),
            ),
        )
