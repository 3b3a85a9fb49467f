"""An encoder as an embedder."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from engine.core.messages import EmbeddingInfo
from engine.models.embedding_head import EmbeddingHead
from engine.models.embedding_spec import EmbeddingSpec
from engine.models.encoder import BLOCK_SIZE, Encoder, EncoderInputs, named_as_in, position_rows
from engine.models.encoder_spec import EncoderSpec
from engine.models.weights import Progress, load_checkpoint, load_dummy, tensor_names
from engine.ops.placement import CPU, Placement
from engine.runner.device_inputs import send_texts
from engine.runner.device_pooling import DevicePooling
from engine.runner.gpu import watching_for_loss
from engine.runner.memory import ENCODER_STEP_TOKENS
from engine.runner.text_batch import TextBatch
from engine.runner.warm_up import embed_blanks


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
        placement: Placement = CPU,
    ) -> None:
        max_len = min(spec.max_len, embedding.max_len or spec.max_len)
        self._spec, self._ctx, self._placement = spec, ctx, placement
        self._encoder = make_encoder(spec, dtype, ops, ctx, max_len, placement)
        self._head = EmbeddingHead.beside(embedding, spec.hidden_size, ops=ops, ctx=ctx, placement=placement)
        pooling = "+".join(embedding.pooling)
        self.info = EmbeddingInfo(self._head.size, max_len, spec.vocab_size, pooling, embedding.is_normalized)
        load_encoder(self._encoder.slots(), spec, directory, is_dummy=is_dummy, progress=progress)
        self._head.load(directory, is_dummy=is_dummy)

    def compute(
        self, texts: Sequence[np.ndarray], second_starts: Sequence[int], adapters: Sequence[None]
    ) -> Generator[None, None, np.ndarray]:
        """Vectors float32 [texts, size]; yields between two layers, and where a GPU is still at the last one.

        Raises: `DeviceLost` after which the GPU does nothing more for this process.
        """
        return (yield from watching_for_loss(self._ctx, self._compute(texts)))

    def _compute(self, texts: Sequence[np.ndarray]) -> Generator[None, None, np.ndarray]:
        inputs, device = encoder_inputs(texts, self._spec), self._placement.device
        lens, starts = [len(text) for text in texts], torch.zeros(len(texts), dtype=torch.int32)
        if self._placement.is_host:
            hidden = yield from self._encoder.forward(inputs)
            pooling = self._head.start(lens)
            pooling.take(hidden, inputs.plan.cu_seqlens_q, starts)
            return pooling.vectors()
        hidden = yield from self._encoder.forward(send_texts(inputs, device))
        on_device = DevicePooling(self._head, lens, device)
        on_device.take(hidden, inputs.plan.cu_seqlens_q, starts)
        on_device.send_home()
        yield
        return on_device.vectors()

    def warm_up(self) -> None:
        """As `embed_blanks`, for all that an encoder launches."""
        embed_blanks(self, encoder_batches(self.info.max_len))


def make_encoder(
    spec: EncoderSpec, dtype: str, ops: ModuleType, ctx: Any, max_len: int, placement: Placement
) -> Encoder:
    """For batches of ENCODER_STEP_TOKENS, or a text of `max_len` tokens alone."""
    most = max(ENCODER_STEP_TOKENS, max_len)
    with placement.making():
        return Encoder(spec, dtype, ops=ops, ctx=ctx, max_tokens=most, max_blocks=most, placement=placement)


def encoder_batches(max_len: int) -> Iterator[list[int]]:
    """Lengths of texts of batches that between them launch all there is: the shortest, and as many as fit of
    the longest, which may exceed a window."""
    yield [1]
    yield [max_len] * max(1, ENCODER_STEP_TOKENS // max_len)


def encoder_inputs(
    texts: Sequence[np.ndarray], spec: EncoderSpec, second_starts: Sequence[int] | None = None
) -> EncoderInputs:
    """A batch of whole texts, packed; where `second_starts` is given, tokens from there on are of type 1."""
    lens = np.array([len(text) for text in texts])
    batch = TextBatch(lens, BLOCK_SIZE, is_causal=False)
    positions, slot_ids, plan = batch.piece(np.zeros_like(lens), lens)
    token_ids = torch.from_numpy(np.concatenate(texts).astype(np.int32))
    type_ids = None
    if second_starts is not None:
        type_ids = (positions >= torch.from_numpy(np.repeat(np.array(second_starts), lens))).int()
    rows = position_rows(token_ids, positions, spec.first_position)
    return EncoderInputs(token_ids, positions, rows, slot_ids, plan, type_ids)


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
