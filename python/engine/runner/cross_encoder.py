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
from engine.models.encoder import Encoder
from engine.models.encoder_spec import EncoderSpec
from engine.models.label_head import LabelHead
from engine.models.sentence_files import read_sentence_files
from engine.models.weights import Progress
from engine.runner.encoder_embedder import encoder_inputs, load_encoder
from engine.runner.memory import ENCODER_STEP_TOKENS


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
        max_tokens = max(self.max_step_tokens, max_len)
        self.info = EmbeddingInfo(1, max_len, spec.vocab_size, spec.label_pooling, False, scores_pairs=True)
        self._ops, self._ctx = ops, ctx
        self._encoder = Encoder(spec, dtype, ops=ops, ctx=ctx, max_tokens=max_tokens, max_blocks=max_tokens)
        self._head = LabelHead(spec, ops=ops, ctx=ctx)
        self._has_types = spec.num_types > 1
        self._is_sigmoid = spec.label_activation == "sigmoid"
        slots = self._encoder.slots() | self._head.slots()
        load_encoder(slots, spec, directory, is_dummy=is_dummy, progress=progress)

    def compute(
        self, texts: Sequence[np.ndarray], second_starts: Sequence[int], adapters: Sequence[None]
    ) -> Generator[None, None, np.ndarray]:
        """Scores float32 [pairs, 1]; yields between two layers."""
        inputs = encoder_inputs(texts, second_starts if self._has_types else None)
        hidden = yield from self._encoder.forward(inputs)
        scores = self._head.scores(self._pooled(hidden, inputs.plan.cu_seqlens_q)).numpy()
        if self._is_sigmoid:
            scores[:, 0] = [_sigmoid(score) for score in scores[:, 0].tolist()]
        return scores

    def _pooled(self, hidden: torch.Tensor, cu_rows: torch.Tensor) -> torch.Tensor:
        """What the head reads of each text, float32 [pairs, hidden size]."""
        if self.info.pooling == "cls":
            return hidden.index_select(0, cu_rows[:-1])
        sums = torch.zeros(len(cu_rows) - 1, hidden.shape[1])
        self._ops.pool(self._ctx, hidden, cu_rows, torch.zeros_like(cu_rows[1:]), "sum", sums)
        return sums.div_(cu_rows.diff()[:, None])


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0
