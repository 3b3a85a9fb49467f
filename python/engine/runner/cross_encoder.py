"""An encoder that reads two texts at once and says how well they fit."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from engine.core.messages import EmbeddingInfo
from engine.errors import ConfigError
from engine.models.encoder_spec import EncoderSpec
from engine.models.label_head import LabelHead
from engine.models.sentence_files import read_sentence_files
from engine.models.weights import Progress
from engine.ops.placement import CPU, Placement
from engine.ops.transfer import fetch
from engine.runner.device_inputs import send_texts
from engine.runner.encoder_embedder import encoder_batches, encoder_inputs, load_encoder, make_encoder
from engine.runner.gpu import watching_for_loss
from engine.runner.memory import ENCODER_STEP_TOKENS
from engine.runner.warm_up import embed_blanks


class CrossEncoder:
    """Implements `core.embedding_core.Embedder`; the vector of a pair is its score.

    A pair has up to `max_len` tokens, or fewer where the checkpoint says so.
    Raises: `ConfigError` or `CheckpointError` when the model cannot be loaded.
    """

    max_step_tokens = ENCODER_STEP_TOKENS
    adapter_reader = None

    def __init__(
        self,
        spec: EncoderSpec,
        directory: str | Path,
        *,
        ops: ModuleType,
        ctx: Any,
        dtype: str,
        max_len: int | None = None,
        is_dummy: bool = False,
        progress: Progress | None = None,
        placement: Placement = CPU,
    ) -> None:
        if spec.num_labels != 1:
            raise ConfigError(
                f"the checkpoint tells {spec.num_labels} labels apart; only those with one, which score "
                "pairs, are supported"
            )
        files = read_sentence_files(Path(directory))
        if files.default_prompt is not None:
            raise ConfigError("config_sentence_transformers.json: a default prompt for pairs is unsupported")
        max_len = min(limit for limit in (spec.max_len, files.max_len, max_len) if limit is not None)
        self.info = EmbeddingInfo(1, max_len, spec.vocab_size, spec.label_pooling, False, scores_pairs=True)
        self._ops, self._ctx, self._spec, self._placement = ops, ctx, spec, placement
        self._encoder = make_encoder(spec, dtype, ops, ctx, max_len, placement)
        with placement.making():
            self._head = LabelHead(spec, ops=ops, ctx=ctx)
        self._has_types = spec.num_types > 1
        self._is_sigmoid = spec.label_activation == "sigmoid"
        slots = self._encoder.slots() | self._head.slots()
        load_encoder(slots, spec, directory, is_dummy=is_dummy, progress=progress)

    def compute(
        self, texts: Sequence[np.ndarray], second_starts: Sequence[int], adapters: Sequence[None]
    ) -> Generator[None, None, np.ndarray]:
        """Scores float32 [pairs, 1]; yields between two layers, and where a GPU is still at the last one.

        Raises: `DeviceLost` after which the GPU does nothing more for this process.
        """
        return (yield from watching_for_loss(self._ctx, self._compute(texts, second_starts)))

    def _compute(
        self, texts: Sequence[np.ndarray], second_starts: Sequence[int]
    ) -> Generator[None, None, np.ndarray]:
        inputs = encoder_inputs(texts, self._spec, second_starts if self._has_types else None)
        if not self._placement.is_host:
            inputs = send_texts(inputs, self._placement.device)
        hidden = yield from self._encoder.forward(inputs)
        fetched = fetch([self._head.scores(self._pooled(hidden, inputs.plan.cu_seqlens_q))])
        if not self._placement.is_host:
            yield
        (scores,) = fetched()
        if self._is_sigmoid:
            scores[:, 0] = [_sigmoid(score) for score in scores[:, 0].tolist()]
        return scores

    def _pooled(self, hidden: torch.Tensor, cu_rows: torch.Tensor) -> torch.Tensor:
        """What the head reads of each text, float32 [pairs, hidden size]."""
        if self.info.pooling == "cls":
            return hidden.index_select(0, cu_rows[:-1]).float()
        sums = torch.zeros(len(cu_rows) - 1, hidden.shape[1], device=hidden.device)
        self._ops.pool(self._ctx, hidden, cu_rows, torch.zeros_like(cu_rows[1:]), "sum", sums)
        return sums.div_(cu_rows.diff()[:, None])

    def warm_up(self) -> None:
        """As `embed_blanks`, for all that an encoder launches."""
        embed_blanks(self, encoder_batches(self.info.max_len))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0
