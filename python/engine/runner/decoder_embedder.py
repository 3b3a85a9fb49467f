"""A decoder as an embedder, beside generation on the same weights or alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from engine.adapters.lora import AdapterReader
from engine.core.messages import EmbeddingInfo
from engine.gguf_file import is_gguf
from engine.models.adapter_rows import number_adapters
from engine.models.any_model import AnyModel, AnySpec
from engine.models.checkpoint import load_weights
from engine.models.decoder import Decoder, DecoderInputs
from engine.models.embedding_head import EmbeddingHead, PoolingBatch
from engine.models.embedding_spec import EmbeddingSpec
from engine.models.spec import ModelSpec
from engine.models.text_part import name_in_part
from engine.models.weights import Progress, load_dummy, tensor_names
from engine.ops.placement import CPU, Placement
from engine.runner.device_inputs import DeviceInputs
from engine.runner.device_pooling import DevicePooling
from engine.runner.gpu import watching_for_loss
from engine.runner.kv_cache import KVCache
from engine.runner.memory import TEXT_BLOCK_SIZE, num_text_blocks
from engine.runner.text_batch import TextBatch
from engine.runner.warm_up import ROW_COUNTS, embed_blanks

_PREFIX, _HEAD = "model.", "lm_head"
_HEADS = (f"{_HEAD}.", "output.")
"""What names of tensors of the head begin with, the second in GGUF files."""


class DecoderEmbedder:
    """Implements `core.embedding_core.Embedder`.

    A batch of up to `max_tokens` tokens is one step; a longer text is computed in chunks of as many, cut
    at the same places whatever else there is, or as a whole by a model whose tokens see both ways. Keys
    and values live in blocks of its own, so that no text waits for blocks that generation holds, and for
    no longer than a batch.
    Cost: the memory of as many blocks as the largest batch so far had, at most those of `max_len` tokens or
    of `max_tokens` texts of one block.
    """

    def __init__(
        self,
        decoder: AnyModel,
        spec: AnySpec,
        head: EmbeddingHead,
        *,
        dtype: str,
        block_size: int,
        max_tokens: int,
        max_len: int,
        adapter_reader: AdapterReader | None = None,
        placement: Placement = CPU,
        ctx: Any = None,
    ) -> None:
        """`ctx` is the decoder's execution context, which tells whether a GPU is lost."""
        self.info = EmbeddingInfo(
            head.size,
            max_len,
            spec.vocab_size,
            "+".join(head.spec.pooling),
            head.spec.is_normalized,
            takes_adapters=adapter_reader is not None,
        )
        self.adapter_reader = adapter_reader
        self.max_step_tokens = max_tokens
        self._decoder = decoder
        self._head = head
        self._block_size = block_size
        self._is_causal = spec.is_causal
        self._most_window = 0 if placement.is_host else max(spec.windows)
        self._chunk = max_tokens if spec.is_causal else max(max_tokens, max_len)
        num_blocks = num_text_blocks(max_tokens, max_len, block_size)
        cache = KVCache(
            spec,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=getattr(torch, dtype),
            placement=placement,
        )
        self._kv_layers = cache.layers
        self._ctx, self._device = ctx, placement.device
        self._device_inputs: DeviceInputs | None = None
        if not placement.is_host:
            self._device_inputs = DeviceInputs(placement.device, block_size=block_size, spare_block=0)

    def compute(
        self, texts: Sequence[np.ndarray], second_starts: Sequence[int], adapters: Sequence[Any]
    ) -> Generator[None, None, np.ndarray]:
        """Vectors float32 [texts, size]; yields between two chunks, and where a GPU is still at the last one.

        Raises: `DeviceLost` after which the GPU does nothing more for this process.
        """
        return (yield from watching_for_loss(self._ctx, self._compute(texts, adapters)))

    def _compute(
        self, texts: Sequence[np.ndarray], adapters: Sequence[Any]
    ) -> Generator[None, None, np.ndarray]:
        lens = np.array([len(text) for text in texts])
        pooling: PoolingBatch | DevicePooling = self._head.start(lens)
        if self._device_inputs is not None:
            pooling = DevicePooling(self._head, lens, self._device)
        batch = TextBatch(lens, self._block_size, is_causal=self._is_causal)
        token_ids = np.concatenate(texts)
        different, adapter_of_text = number_adapters(adapters)
        for start in range(0, len(token_ids), self._chunk):
            # More than one chunk only where a text is alone.
            chunk = token_ids[start : start + self._chunk]
            counts = lens if len(texts) > 1 else np.array([len(chunk)])
            starts = np.full(len(texts), start)
            positions, slot_ids, plan = batch.piece(starts, counts)
            inputs = DecoderInputs(  # every row is wanted, and none draws a token
                token_ids=torch.from_numpy(chunk.astype(np.int32)),
                positions=positions,
                slot_ids=slot_ids,
                logit_rows=torch.arange(len(chunk)),
                plan=plan,
                adapters=different,
                adapter_of_token=None if adapter_of_text is None else np.repeat(adapter_of_text, counts),
            )
            if self._device_inputs is not None:
                inputs = self._device_inputs.send(inputs)
            hidden = self._decoder.forward(inputs, self._kv_layers)
            self._decoder.end_step()
            pooling.take(hidden, plan.cu_seqlens_q, torch.from_numpy(starts.astype(np.int32)))
            if start + len(chunk) < len(token_ids):
                yield
        if isinstance(pooling, DevicePooling):
            pooling.send_home()
            yield
        return pooling.vectors()

    def warm_up(self) -> None:
        """As `embed_blanks`, for all that is launched beside adapters, up to the longest batch."""
        lens = {*ROW_COUNTS, self._most_window + 2, self._chunk}
        singles = sorted({min(count, self.info.max_len) for count in lens})
        embed_blanks(self, [*([count] for count in singles), [1] * self.max_step_tokens])


def load_decoder_embedder(
    spec: ModelSpec,
    embedding: EmbeddingSpec,
    directory: str | Path,
    *,
    ops: ModuleType,
    ctx: Any,
    dtype: str,
    max_tokens: int,
    max_lora_rank: int = 0,
    quantization: str = "none",
    is_dummy: bool = False,
    progress: Progress | None = None,
    placement: Placement = CPU,
) -> DecoderEmbedder:
    """A decoder that only embeds, in any form that `load_weights` reads, with or without "model." before its
    names, its head left alone. Without a `max_lora_rank` it takes no adapters.

    Raises: `ConfigError` or `CheckpointError` when it cannot be loaded.
    """
    max_len = embedding.longest_text(spec.max_position_embeddings)
    stored = {name: kept for name, kept in spec.stored.items() if name != _HEAD}
    has_prefix = (
        is_gguf(directory)
        or is_dummy
        or any(name_in_part(name).startswith(_PREFIX) for name in tensor_names(directory))
    )
    ours = stored if has_prefix else {_PREFIX + name: kept for name, kept in stored.items()}
    with placement.making():
        decoder = Decoder(
            dataclasses.replace(spec, tie_word_embeddings=True, stored=ours),  # nobody reads the head
            dtype,
            ops=ops,
            ctx=ctx,
            max_tokens=max_tokens if spec.is_causal else max(max_tokens, max_len),
            max_rows=1,
            num_positions=max_len,
            max_lora_rank=max_lora_rank,
            quantization=quantization,
            placement=placement,
        )
    slots = decoder.slots()
    if is_dummy:
        load_dummy(slots, progress=progress)
    else:
        if not has_prefix:
            slots = {name.removeprefix(_PREFIX): slot for name, slot in slots.items()}
        load_weights(
            directory,
            dataclasses.replace(spec, stored=stored),
            slots,
            is_ignored=lambda name: name.startswith(_HEADS) or decoder.is_ignored(name),
            progress=progress,
        )
    head = EmbeddingHead.beside(embedding, spec.hidden_size, ops=ops, ctx=ctx, placement=placement)
    head.load(directory, is_dummy=is_dummy)
    reader = None
    if max_lora_rank:
        sites, kept = decoder.lora_sites(), {"dtype": dtype, "ops": ops, "placement": placement}
        reader = AdapterReader(sites, directory, max_rank=max_lora_rank, **kept)
    return DecoderEmbedder(
        decoder,
        spec,
        head,
        dtype=dtype,
        block_size=TEXT_BLOCK_SIZE,
        max_tokens=max_tokens,
        max_len=max_len,
        adapter_reader=reader,
        placement=placement,
        ctx=ctx,
    )
