"""From a configuration to the part of the engine that embeds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from engine.config.engine_config import EngineConfig
from engine.core.resolve import ResolvedConfig
from engine.models.embedding_spec import read_embedding_spec

if TYPE_CHECKING:
    from engine.core.embedding_core import Embedder
    from engine.runner.model_runner import ModelRunner


def embedder_of_decoder(config: EngineConfig, resolved: ResolvedConfig, runner: ModelRunner) -> Embedder:
    """A chat model as an embedder, on the weights that it has in memory.

    Raises: `ConfigError` or `CheckpointError` when the checkpoint's own embedding files are broken.
    """
    from engine.models.embedding_head import EmbeddingHead
    from engine.ops import native
    from engine.runner.decoder_embedder import DecoderEmbedder

    spec = read_embedding_spec(
        Path(config.model_path), pooling=config.pooling, dimensions=config.matryoshka_dimensions
    )
    head = EmbeddingHead(spec, runner.spec.hidden_size, ops=native, ctx=runner.context)
    head.load(config.model_path, is_dummy=config.load_format == "dummy")
    return DecoderEmbedder(
        runner.model,
        runner.spec,
        head,
        dtype=resolved.dtype,
        block_size=resolved.page_size,
        max_tokens=resolved.chunked_prefill_size,
        max_len=min(resolved.context_length, spec.max_len or resolved.context_length),
    )
