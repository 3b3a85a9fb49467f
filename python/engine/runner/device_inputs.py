"""The inputs of a step on a GPU, padded where they are for a graph, and sent in one copy."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import torch

from engine.models.decoder import DecoderInputs
from engine.models.encoder import EncoderInputs
from engine.ops.attention_plan import AttentionPlan
from engine.ops.cuda.plan import DevicePlan, split_rows
from engine.ops.transfer import send
from engine.sampling.drawn_ids import LateIds


class DecodeShape(NamedTuple):
    """Steps in which every row has one token: so many rows, none with more than `max_kv_len` tokens."""

    num_rows: int
    max_kv_len: int


class DeviceInputs:
    """Turns the inputs that `BatchInputs` builds into those of the device.

    Rows that fill a step up to its shape write to `spare_block`, which no request ever has.
    """

    def __init__(self, device: torch.device, *, block_size: int, spare_block: int) -> None:
        self._device, self._block_size, self._spare_block = device, block_size, spare_block

    def send(
        self,
        inputs: DecoderInputs,
        shape: DecodeShape | None = None,
        into: torch.Tensor | None = None,
        late: LateIds | None = None,
    ) -> DecoderInputs:
        """All on the device, where `late` token ids are filled in. `shape` is one that the step fits, `into`
        memory of `num_bytes(shape)`."""
        plan = inputs.plan
        kv_lens, cu_seqlens_q = plan.kv_lens.numpy(), plan.cu_seqlens_q.numpy()
        max_kv_len = int(kv_lens.max()) if shape is None else shape.max_kv_len
        num_columns = -(-max_kv_len // self._block_size)
        tables = plan.block_tables[:, :num_columns].numpy()
        if shape is None:
            decode_rows, tiles = split_rows(cu_seqlens_q, is_causal=plan.is_causal)
            max_decode_kv_len = int(kv_lens[decode_rows].max(initial=0))
            arrays = [
                inputs.token_ids.numpy(),
                inputs.positions.numpy(),
                inputs.slot_ids.numpy(),
                inputs.logit_rows.numpy(),
                cu_seqlens_q,
                kv_lens,
                tables,
                decode_rows,
                tiles,
            ]
        else:
            arrays = self._padded(inputs, kv_lens, tables, (shape.num_rows, num_columns))
            max_decode_kv_len = max_kv_len
        if late is not None:  # behind the others, which have fixed places for a graph
            arrays += [late.places, late.rows]
        tokens, positions, slots, logits, cu_seqlens, lens, blocks, decode, tiles, *where = send(
            arrays, self._device, into
        )
        if late is not None:
            late.put(tokens, *where)
        return dataclasses.replace(
            inputs,
            token_ids=tokens,
            positions=positions,
            slot_ids=slots,
            logit_rows=logits,
            host_logit_rows=inputs.logit_rows.numpy(),
            plan=DevicePlan(
                cu_seqlens_q=cu_seqlens,
                kv_lens=lens,
                block_tables=blocks,
                is_causal=plan.is_causal,
                decode_rows=decode,
                tiles=tiles,
                max_decode_kv_len=max_decode_kv_len,
                max_kv_len=max_kv_len,
            ),
        )

    def idle(self, num_tokens: int, kv_len: int = 1, num_logits: int = 1) -> DecoderInputs:
        """On the host: the last `num_tokens` tokens of a text of `kv_len`, which read the spare block and
        write nowhere."""
        num_blocks = -(-kv_len // self._block_size)
        return DecoderInputs(
            token_ids=torch.zeros(num_tokens, dtype=torch.int32),
            positions=torch.arange(kv_len - num_tokens, kv_len, dtype=torch.int32),
            slot_ids=torch.full((num_tokens,), -1),
            logit_rows=torch.arange(num_logits),
            plan=AttentionPlan(
                cu_seqlens_q=torch.tensor([0, num_tokens], dtype=torch.int32),
                kv_lens=torch.tensor([kv_len], dtype=torch.int32),
                block_tables=torch.full((1, num_blocks), self._spare_block, dtype=torch.int32),
            ),
        )

    def num_bytes(self, shape: DecodeShape) -> int:
        """Of the memory that inputs of a shape take, at most."""
        columns = -(-shape.max_kv_len // self._block_size)
        return shape.num_rows * (4 * columns + 4 * 5 + 8 * 4) + 16 * 12

    def _padded(
        self, inputs: DecoderInputs, kv_lens: np.ndarray, tables: np.ndarray, table_shape: tuple[int, int]
    ) -> list[np.ndarray]:
        """Arrays of decode rows, filled up with rows of one token in the spare block."""
        num_rows = table_shape[0]

        def pad(array: np.ndarray, value: int) -> np.ndarray:
            return np.concatenate([array, np.full(num_rows - len(array), value, array.dtype)])

        whole_tables = np.full(table_shape, self._spare_block, tables.dtype)
        whole_tables[: len(tables), : tables.shape[1]] = tables

        numbers = np.arange(num_rows + 1, dtype=np.int32)
        return [
            pad(inputs.token_ids.numpy(), 0),
            pad(inputs.positions.numpy(), 0),
            pad(inputs.slot_ids.numpy(), self._spare_block * self._block_size),
            numbers[:-1].astype(np.int64),
            numbers,
            pad(kv_lens, 1),
            whole_tables,
            numbers[:-1],
            np.empty((0, 2), np.int32),
        ]


def send_texts(inputs: EncoderInputs, device: torch.device) -> EncoderInputs:
    """The inputs of an encoder on the device, in one copy."""
    plan = inputs.plan
    decode_rows, tiles = split_rows(plan.cu_seqlens_q.numpy(), is_causal=plan.is_causal)
    parts = [inputs.token_ids, inputs.positions, inputs.position_rows, inputs.slot_ids]
    parts += [plan.cu_seqlens_q, plan.kv_lens, plan.block_tables]
    if inputs.type_ids is not None:
        parts.append(inputs.type_ids)
    arrays = [decode_rows, tiles, *(part.numpy() for part in parts)]
    decode, tiles, tokens, positions, rows, slots, cu_seqlens, lens, blocks, *types = send(arrays, device)
    max_kv_len = int(plan.kv_lens.max())
    return EncoderInputs(
        token_ids=tokens,
        positions=positions,
        position_rows=rows,
        slot_ids=slots,
        plan=DevicePlan(
            cu_seqlens_q=cu_seqlens,
            kv_lens=lens,
            block_tables=blocks,
            is_causal=plan.is_causal,
            decode_rows=decode,
            tiles=tiles,
            max_decode_kv_len=max_kv_len,
            max_kv_len=max_kv_len,
        ),
        type_ids=types[0] if types else None,
    )
