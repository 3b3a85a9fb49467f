"""Text of a token stream, given out as soon as it cannot change any more."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from engine.text.token_decoding import Piece, TokenDecoding
from engine.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class IncrementalDetokenizer:
    """Turns token ids into text, a few at a time.

    All pushes and `finish` joined are what `Tokenizer.decode` gives for all ids at once, however
    the ids are split. Nothing given out is ever taken back: an unfinished UTF-8 character waits
    for its last byte. With byte-fallback vocabularies a run of byte tokens waits for its end,
    because one wrong byte turns the whole run into U+FFFD.

    `shown_ids` are special tokens that are text all the same: what marks a tool call, for those who
    read calls.

    Cost: O(1) per token, amortised; at most 3 bytes (or one run of byte tokens) are kept.
    Raises: `ConfigError` if the tokenizer's decoder cannot be followed token by token.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        shown_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        special_ids = tokenizer.special_ids - shown_ids if shown_ids else tokenizer.special_ids
        self._skipped = special_ids if skip_special_tokens else frozenset()
        decoding = tokenizer.decoding
        self._joiner = _Utf8Stream() if decoding.byte_level else _ByteRuns(decoding)
        self._at_start = True
        self._to_strip = decoding.stripped_at_start
        self._num_pending = 0
        self.num_flushed = 0
        """How many of the last push's characters come before its token: what earlier ones left unfinished."""
        self._is_midway = False
        """Whether all text so far is given out, and what follows needs no regard for it."""

    @classmethod
    def after_prompt(
        cls,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        skip_special_tokens: bool = True,
        shown_ids: frozenset[int] = frozenset(),
    ) -> IncrementalDetokenizer:
        """A detokenizer for what follows `prompt_ids`; the prompt's own text is not given out.

        The output reads as the continuation of the prompt: SentencePiece vocabularies drop the
        space before the first word of a text, and after a prompt with any text in it the output
        does not begin one. A character that the prompt leaves unfinished belongs to the output if
        the output finishes it; if not, its U+FFFD belongs to the prompt.

        Cost: looks at the end of the prompt only, back to the last token with text.
        """
        detokenizer = cls(tokenizer, skip_special_tokens, shown_ids)
        context: list[Piece] = []
        for token_id in map(int, reversed(prompt_ids)):
            if token_id in detokenizer._skipped:
                continue
            piece = tokenizer.piece(token_id)
            if piece is None:
                continue
            detokenizer._at_start = False
            detokenizer._to_strip = ""
            context.append(piece)
            if isinstance(piece, str) or sum(map(len, context)) >= _MAX_UNFINISHED:
                break
        tail = b"".join(piece for piece in reversed(context) if isinstance(piece, bytes))
        detokenizer._joiner.carry = _unfinished_character(tail)
        return detokenizer

    @property
    def num_pending(self) -> int:
        """How many of the last tokens have text that is not, or not completely, given out yet."""
        return self._num_pending

    def push(self, token_ids: Iterable[int]) -> str:
        """Take more tokens; returns the text that is now final, often empty."""
        return "".join([self.push_one(token_id) for token_id in token_ids])

    def push_one(self, token_id: int) -> str:
        """Take one more token; returns the text that is now final."""
        if self._is_midway and (text := self._tokenizer.whole_text(token_id)) is not None:
            return "" if token_id in self._skipped else text
        text = self._push_with_care(token_id)
        awaits = self._num_pending or self._at_start or self._to_strip or self._joiner.carry
        self._is_midway = not (awaits or self.num_flushed)
        return text

    def finish(self) -> str:
        """The rest of the text: an unfinished character becomes U+FFFD, as `Tokenizer.decode` has it."""
        self._num_pending = 0
        return self._strip(self._joiner.flush())

    def _push_with_care(self, token_id: int) -> str:
        flushed = own = ""
        if token_id not in self._skipped:
            tokenizer = self._tokenizer
            piece = tokenizer.first_piece(token_id) if self._at_start else tokenizer.piece(token_id)
            if piece is not None:
                self._at_start = False
                flushed, own = self._joiner.feed(piece)
        if not self._joiner.is_pending:
            self._num_pending = 0
        elif (flushed or own) and isinstance(self._joiner, _Utf8Stream):
            self._num_pending = 1  # what waits now began inside this token
        else:
            self._num_pending += 1
        flushed = self._strip(flushed)
        self.num_flushed = len(flushed)
        return flushed + self._strip(own)

    def _strip(self, text: str) -> str:
        """Drop the first space of the whole text, where the vocabulary puts one there."""
        if self._to_strip and text:
            text = text.removeprefix(self._to_strip)
            self._to_strip = ""
        return text


class _Utf8Stream:
    """Byte-level vocabularies: every token adds bytes to one stream of UTF-8.

    `carry` holds the bytes of a character that the prompt left unfinished.
    """

    def __init__(self) -> None:
        self.carry = b""
        self._decoder = _Utf8Decoder("replace")

    @property
    def is_pending(self) -> bool:
        return bool(self._decoder.getstate()[0])

    def feed(self, piece: bytes) -> tuple[str, str]:
        """What earlier pieces left and this one does not go on with, and the text from there on."""
        if self.carry and piece:
            carry, self.carry = self.carry, b""
            if _is_unfinished_or_valid(carry + piece[:1]):
                piece = carry + piece
        unfinished = self._decoder.getstate()[0]
        goes_on = not unfinished or _is_unfinished_or_valid(unfinished + piece[:1])
        flushed = "" if goes_on else self.flush()
        return flushed, self._decoder.decode(piece)

    def flush(self) -> str:
        return self._decoder.decode(b"", True)


class _ByteRuns:
    """Vocabularies of text tokens, with tokens for single bytes where a character has none.

    A run of byte tokens decodes as a whole: to its text if it is valid UTF-8, otherwise to one
    U+FFFD for each byte. `carry` holds the bytes of a character that the prompt left unfinished.
    """

    def __init__(self, decoding: TokenDecoding) -> None:
        self.carry = b""
        self._decoding = decoding
        self._run = bytearray()

    @property
    def is_pending(self) -> bool:
        return bool(self._run)

    def feed(self, piece: Piece) -> tuple[str, str]:
        """The text of the run that this piece ends, and its own."""
        if isinstance(piece, str):
            return self.flush(), piece
        if self.carry and not self._run and not _is_unfinished_or_valid(self.carry + piece):
            self.carry = b""
        self._run += piece
        return "", ""

    def flush(self) -> str:
        run, carry = self._run, self.carry
        self._run, self.carry = bytearray(), b""
        if not run:
            return ""
        try:
            return self._decoding.after_bytes((carry + run).decode())
        except UnicodeDecodeError:
            return _REPLACEMENT * len(run)


_MAX_UNFINISHED = 3  # bytes: a UTF-8 character has at most four


def _is_unfinished_or_valid(data: bytes) -> bool:
    """Whether `data` is UTF-8 but for a last character that may still be completed."""
    try:
        _Utf8Decoder().decode(data)
    except UnicodeDecodeError:
        return False
    return True


def _unfinished_character(data: bytes) -> bytes:
    """The bytes at the end of `data` that begin a character without finishing it."""
    if data[-1:] < b"\x80":  # it ends in ASCII, or there is nothing
        return b""
    decoder = _Utf8Decoder("replace")
    decoder.decode(data)
    return decoder.getstate()[0]
