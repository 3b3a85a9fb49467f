"""The tokens of a vocabulary as bytes, and how forced text is cut into them."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import msgspec
import numpy as np

if TYPE_CHECKING:
    from engine.text.tokenizer import Tokenizer

MAX_REMEMBERED_BYTES = 2**20
"""Forced text whose tokens are remembered; `_BYTES_EACH` are counted beside those of each text."""
_BYTES_EACH = 64

_SLICE = 4096
"""Tokens handled at a time while the interpreter lock is held."""


class VocabularyData(msgspec.Struct, array_like=True):
    """A vocabulary on its way between processes.

    `tokens` has the bytes of each id, empty for special tokens, but those that mark tool calls, and for
    rows without a token; `order` the ids of the others, sorted by their bytes, as little-endian int32.
    """

    tokens: list[bytes]
    order: bytes
    end_token_id: int | None

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, vocab_size: int) -> VocabularyData:
        from engine.text.formats.known import marker_ids  # only the process that reads the tokenizer needs it

        special = (tokenizer.special_ids | tokenizer.eos_token_ids) - marker_ids(tokenizer)
        tokens = [b"" if i in special else tokenizer.token_bytes(i) for i in range(vocab_size)]
        order = sorted((i for i, token in enumerate(tokens) if token), key=tokens.__getitem__)
        end_id = None if tokenizer.eos_token is None else tokenizer.token_id(tokenizer.eos_token)
        return cls(tokens, np.array(order, "<i4").tobytes(), end_id)


class Vocabulary:
    """Looks tokens up by their bytes. Built in slices: other threads go on."""

    def __init__(self, data: VocabularyData) -> None:
        self.tokens = data.tokens
        self.end_token_id = data.end_token_id
        self._ids = np.frombuffer(data.order, "<i4")
        self._sorted: list[bytes] = []
        self._id_of: dict[bytes, int] = {}
        self._longest: dict[bytes, int] = {}
        self._longer: dict[int, np.ndarray] = {}
        self._canonical: dict[bytes, tuple[int, ...]] = {}
        self._num_remembered_bytes = 0
        for ids in _slices(self._ids):
            for token_id in ids.tolist():
                token = self.tokens[token_id]
                self._sorted.append(token)
                self._id_of.setdefault(token, token_id)
                start = token[:2]
                self._longest[start] = max(self._longest.get(start, 0), len(token))
        pair = self._id_of.get(b"a"), self._id_of.get(b"e")
        self.witnesses = None if pair[0] is None or pair[1] is None else (pair[0], pair[1])
        """Two tokens that begin differently, and that most texts may go on with."""

    def canonical(self, text: bytes) -> tuple[int, ...]:
        """The fewest tokens that spell `text`, longer ones first among equals; none if none do.

        Cost: a dictionary look-up for each byte and each length of token that could begin there, 1 to 4 us a
        byte; the answers of schemas ask for the same again and again, which is remembered.
        """
        token_ids = self._canonical.get(text)
        if token_ids is None:
            self._num_remembered_bytes += _BYTES_EACH + len(text)
            if self._num_remembered_bytes > MAX_REMEMBERED_BYTES:
                self._canonical.clear()
                self._num_remembered_bytes = _BYTES_EACH + len(text)
            token_ids = self._canonical[text] = self._fewest(text)
        return token_ids

    def spelled(self, token_id: int) -> tuple[int, ...]:
        """The fewest shorter tokens that spell this one; none if none do."""
        text = self.tokens[token_id]
        cuts = ((self.canonical(text[:at]), self.canonical(text[at:])) for at in range(1, len(text)))
        return min((head + tail for head, tail in cuts if head and tail), key=len, default=())

    def _fewest(self, text: bytes) -> tuple[int, ...]:
        num_bytes = len(text)
        fewest: list[float] = [math.inf] * num_bytes + [0]
        first: list[int] = [-1] * num_bytes
        for start in range(num_bytes - 1, -1, -1):
            head = text[start : start + 2]
            longest = max(self._longest.get(head, 0), self._longest.get(head[:1], 0))
            for end in range(min(start + longest, num_bytes), start, -1):
                if fewest[end] + 1 < fewest[start]:
                    token_id = self._id_of.get(text[start:end])
                    if token_id is not None:
                        fewest[start], first[start] = fewest[end] + 1, token_id
        if fewest[0] == math.inf:
            return ()
        token_ids, start = [], 0
        while start < num_bytes:
            token_ids.append(first[start])
            start += len(self.tokens[first[start]])
        return tuple(token_ids)

    def longer(self, token_id: int) -> np.ndarray:
        """Ids of the tokens that begin with the bytes of this one and go on; int32."""
        found = self._longer.get(token_id)
        if found is None:
            token = self.tokens[token_id]
            begin = bisect.bisect_right(self._sorted, token)
            end = bisect.bisect_left(self._sorted, True, lo=begin, key=lambda t: not t.startswith(token))
            found = self._longer[token_id] = self._ids[begin:end]
        return found

    def beginning_with(self, text: bytes) -> np.ndarray:
        """Ids of the tokens that begin with these bytes; int32."""
        begin = bisect.bisect_left(self._sorted, text)
        end = bisect.bisect_left(self._sorted, True, lo=begin, key=lambda t: not t.startswith(text))
        return self._ids[begin:end]


def allows(mask: np.ndarray, token_ids: np.ndarray) -> bool:
    """Whether a bitmask, int32 [ceil(V / 32)], allows any of these tokens."""
    return bool(np.any((mask[token_ids >> 5] >> (token_ids & 31)) & 1))


def _slices(ids: np.ndarray) -> Iterator[np.ndarray]:
    return (ids[i : i + _SLICE] for i in range(0, len(ids), _SLICE))


def only(num_tokens: int, token_ids: np.ndarray) -> np.ndarray:
    """A bitmask, int32 [ceil(V / 32)], of these tokens."""
    flags = np.zeros(-(-num_tokens // 32) * 32, bool)
    flags[token_ids] = True
    return np.packbits(flags, bitorder="little").view(np.int32)


def without(num_tokens: int, token_ids: np.ndarray) -> np.ndarray:
    """A bitmask, int32 [ceil(V / 32)], of all tokens but these."""
    return ~only(num_tokens, token_ids)


def allow_only(mask: np.ndarray, token_id: int) -> None:
    """Make one row of a bitmask allow a single token."""
    mask.fill(0)
    bit = token_id & 31
    mask[token_id >> 5] = 1 << bit if bit < 31 else -(1 << 31)


def allow(mask: np.ndarray, token_id: int) -> None:
    """Add a token to one row of a bitmask."""
    mask.view(np.uint32)[token_id >> 5] |= np.uint32(1 << (token_id & 31))


def forbid(mask: np.ndarray, token_ids: Iterable[int]) -> None:
    """Take tokens out of one row of a bitmask."""
    words = mask.view(np.uint32)
    for token_id in token_ids:
        words[token_id >> 5] &= np.uint32(0xFFFFFFFF ^ (1 << (token_id & 31)))
