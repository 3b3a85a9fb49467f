"""Turns documents into batches: several documents a row, kept apart by the mask and the positions."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from engine.demo.dialogue import Document
from engine.demo.tokenizer import IM_END, IM_START, MAX_LEN, render

ROW_LENS = (256, 512, 1024, MAX_LEN)
ENCODE_AT_ONCE = 512


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of packed documents.

    Shapes: token_ids, positions, documents int64 [R, L]; is_target bool [R, L]: whether the token
    is one that the model learns to produce. `documents` numbers the documents of a row from 1; 0 is padding.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    documents: torch.Tensor
    is_target: torch.Tensor

    def mask(self) -> torch.Tensor:
        """Who sees whom: bool [R, 1, L, L], causal and within one document."""
        same = self.documents[:, :, None] == self.documents[:, None, :]
        return (same & torch.ones_like(same[0]).tril())[:, None]


def target_flags(token_ids: np.ndarray, header: np.ndarray, end_id: int) -> np.ndarray:
    """Marks what the assistant says, the end of its turn included. `header` opens such a turn."""
    flags = np.zeros(len(token_ids), bool)
    for start in np.flatnonzero(token_ids == header[0]):
        first = start + len(header)
        if np.array_equal(token_ids[start:first], header):
            ends = first + np.flatnonzero(token_ids[first:] == end_id)
            flags[first : ends[0] + 1 if len(ends) else None] = True  # without an end where it was cut off
    return flags


def encode(documents: list[Document], tokenizer: Tokenizer) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids and target flags of each document. All of a plain text is learned, but its first token."""
    header = np.array(tokenizer.encode(f"{IM_START}assistant\n").ids)
    end_id = tokenizer.token_to_id(IM_END)
    encoded = []
    for document, result in zip(
        documents, tokenizer.encode_batch_fast([render(d) for d in documents]), strict=True
    ):
        ids = np.array(result.ids[:MAX_LEN])
        encoded.append((ids, np.ones(len(ids), bool) if document.text else target_flags(ids, header, end_id)))
    return encoded


def _pack(queues: list[deque], row_len: int, num_rows: int) -> Batch:
    """Take documents off the queues, the first one first, each into the first row with room for it.

    What fits nowhere stays, in order. Long rows are topped up with short documents from the later queues.
    """
    arrays = np.zeros((4, num_rows, row_len), np.int64)
    used, counts = [0] * num_rows, [0] * num_rows
    for queue in queues:
        for _ in range(len(queue)):
            ids, flags = queue.popleft()
            row = next((r for r in range(num_rows) if used[r] + len(ids) <= row_len), None)
            if row is None:
                queue.append((ids, flags))
                continue
            counts[row] += 1
            place = slice(used[row], used[row] + len(ids))
            for array, values in zip(arrays, (ids, np.arange(len(ids)), counts[row], flags), strict=True):
                array[row, place] = values
            arrays[3, row, place.start] = 0  # nothing comes before the first token, so nothing predicts it
            used[row] += len(ids)
    token_ids, positions, numbers, flags = (torch.from_numpy(a) for a in arrays)
    return Batch(token_ids, positions, numbers, flags.bool())


def batches(documents: Iterator[Document], tokenizer: Tokenizer, batch_tokens: int) -> Iterator[Batch]:
    """Endless batches of `batch_tokens` tokens: many short rows, or a few long ones for long documents."""
    queues = {row_len: deque() for row_len in ROW_LENS}
    while True:
        for ids, flags in encode([next(documents) for _ in range(ENCODE_AT_ONCE)], tokenizer):
            queues[next(n for n in ROW_LENS if len(ids) <= n)].append((ids, flags))
        for row_len in reversed(ROW_LENS):
            shorter = [queues[n] for n in reversed(ROW_LENS) if n <= row_len]
            while sum(len(ids) for ids, _ in queues[row_len]) > batch_tokens:
                yield _pack(shorter, row_len, batch_tokens // row_len)
