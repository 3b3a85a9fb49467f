"""An encoder as an embedder."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from engine.core.messages import EmbeddingInfo
from engine.models.embedding_head import EmbeddingHead
from engine.models.embedding_spec import EmbeddingSpec
from engine.models.encoder import BLOCK_SIZE, Encoder, EncoderInputs, named_as_in
from engine.models.encoder_spec import EncoderSpec
from engine.models.weights import Progress, load_checkpoint, load_dummy, tensor_names
from engine.runner.memory import ENCODER_STEP_TOKENS
from engine.runner.text_batch import TextBatch


class EncoderEmbedder:
    """Implements `core.embedding_core.Embedder`. A text is always computed in one piece.

    Raises: `ConfigError` or `CheckpointError` when the model cannot be loaded.
    """

    max_step_tokens = ENCODER_STEP_TOKENS
    adapter_reader = None

    def __init__(
        self,
        spec: EncoderSpec,
        embedding: EmbeddingSpec,
        directory: str | Path,
        *,
        ops: ModuleType,
        ctx: Any,
        dtype: str,
        is_dummy: bool = False,
        progress: Progress | None = None,
    ) -> None:
        max_len = min(spec.max_len, embedding.max_len or spec.max_len)
        max_tokens = max(self.max_step_tokens, max_len)
        self._encoder = Encoder(spec, dtype, ops=ops, ctx=ctx, max_tokens=max_tokens, max_blocks=max_tokens)
        self._head = EmbeddingHead(embedding, spec.hidden_size, ops=ops, ctx=ctx)
        pooling = "+".join(embedding.pooling)
        self.info = EmbeddingInfo(self._head.size, max_len, spec.vocab_size, pooling, embedding.is_normalized)
        load_encoder(self._encoder.slots(), spec, directory, is_dummy=is_dummy, progress=progress)
        self._head.load(directory, is_dummy=is_dummy)

    def compute(
        self, texts: Sequence[np.ndarray], second_starts: Sequence[int], adapters: Sequence[None]
    ) -> Generator[None, None, np.ndarray]:
        """Vectors float32 [texts, size]; yields between two layers."""
        inputs = encoder_inputs(texts)
        hidden = yield from self._encoder.forward(inputs)
        pooling = self._head.start([len(text) for text in texts])
        starts = torch.zeros(len(texts), dtype=torch.int32)
        pooling.take(hidden, inputs.plan.cu_seqlens_q, starts)
        return pooling.vectors()


def encoder_inputs(texts: Sequence[np.ndarray], second_starts: Sequence[int] | None = None) -> EncoderInputs:
    """A batch of whole texts, packed; where `second_starts` is given, tokens from there on are of type 1."""
    lens = np.array([len(text) for text in texts])
    batch = TextBatch(lens, BLOCK_SIZE, is_causal=False)
    positions, slot_ids, plan = batch.piece(np.zeros_like(lens), lens)
    token_ids = torch.from_numpy(np.concatenate(texts).astype(np.int32))
    type_ids = None
    if second_starts is not None:
        type_ids = (positions >= torch.from_numpy(np.repeat(np.array(second_starts), lens))).int()
    return EncoderInputs(token_ids, positions, slot_ids, plan, type_ids)


def load_encoder(
    slots: dict[str, Any],
    spec: EncoderSpec,
    directory: str | Path,
    *,
    is_dummy: bool,
    progress: Progress | None = None,
) -> None:
    """Fill an encoder from a checkpoint that may have a head, which nobody asked for."""
    if is_dummy:
        load_dummy(slots, progress=progress)
        return
    names = spec.names

    def is_ignored(name: str) -> bool:
        return name.removeprefix(names.prefix).startswith(names.ignored)

    slots = named_as_in(slots, tensor_names(directory), names.prefix)
    load_checkpoint(directory, slots, is_ignored=is_ignored, progress=progress)
