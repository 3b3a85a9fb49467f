"""How a tokenizer's decoder turns token strings into bytes and text.

`tokenizers` decodes whole sequences only. Streaming needs the same rule token by token, so the
decoder's description is read once and turned into a `TokenDecoding`. Three families cover causal
language models: byte-level BPE, SentencePiece exports with byte fallback, and plain Metaspace.

A *piece* is what one token contributes: `bytes` when the token stands for raw bytes, which make
characters only together with their neighbours, or `str` when it is whole text on its own.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from engine.errors import ConfigError

Piece = bytes | str

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclasses.dataclass(frozen=True, slots=True)
class TokenDecoding:
    """The decoding rule of one tokenizer.

    `replacements` apply to each token string, `replacements_after_bytes` also to text that came
    out of byte tokens. `stripped_at_start` is removed once from the start of the whole text.
    `dropped_in_first` is removed from the first token instead of being replaced.
    """

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    replacements_after_bytes: tuple[tuple[str, str], ...] = ()
    stripped_at_start: str = ""
    dropped_in_first: str = ""

    @classmethod
    def parse(cls, decoder: Mapping[str, Any] | None) -> TokenDecoding:
        """Read the "decoder" object of a tokenizer.json.

        Raises: `ConfigError` for a decoder that cannot be followed token by token.
        """
        if decoder is None:
            raise _unsupported("none")
        steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        kinds = [step["type"] for step in steps]
        if kinds == ["ByteLevel"]:
            return cls(byte_level=True)
        if kinds == ["Metaspace"]:
            (step,) = steps
            mark = step["replacement"]
            dropped = "" if step.get("prepend_scheme") == "never" else mark
            return cls(replacements=((mark, " "),), dropped_in_first=dropped)
        return cls._parse_sentencepiece(steps, kinds)

    @classmethod
    def _parse_sentencepiece(cls, steps: list[Mapping[str, Any]], kinds: list[str]) -> TokenDecoding:
        before: list[tuple[str, str]] = []
        after: list[tuple[str, str]] = []
        stripped = ""
        for index, (step, kind) in enumerate(zip(steps, kinds, strict=True)):
            fused = "Fuse" in kinds[:index]
            if kind == "Replace":
                pattern = step["pattern"].get("String", "")
                # Once tokens are fused a longer pattern could span two of them.
                if not pattern or (fused and len(pattern) > 1) or stripped:
                    raise _unsupported(kinds)
                (after if "ByteFallback" in kinds[:index] else before).append((pattern, step["content"]))
            elif kind == "Strip" and fused and (step["start"], step["stop"]) == (1, 0) and not stripped:
                stripped = step["content"]
            elif kind not in ("ByteFallback", "Fuse") or kind in kinds[:index]:
                raise _unsupported(kinds)
        return cls(
            byte_fallback="ByteFallback" in kinds,
            replacements=tuple(before),
            replacements_after_bytes=tuple(after),
            stripped_at_start=stripped,
        )

    def piece(self, token: str, *, first: bool = False) -> Piece:
        """What `token` (as spelled in the vocabulary) contributes; `first`: nothing came before it."""
        if self.byte_level:
            try:
                return bytes([_BYTE_OF_CHAR[char] for char in token])
            except KeyError:  # an added token, spelled as it is
                return token.encode()
        if first and self.dropped_in_first:
            token = token.replace(self.dropped_in_first, "")
        for old, new in self.replacements:
            token = token.replace(old, new)
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        return self.after_bytes(token)

    def after_bytes(self, text: str) -> str:
        """Apply the replacements that the decoder makes after bytes have become text."""
        for old, new in self.replacements_after_bytes:
            text = text.replace(old, new)
        return text


def _unsupported(kinds: list[str] | str) -> ConfigError:
    found = kinds if isinstance(kinds, str) else " + ".join(kinds)
    return ConfigError(
        f"tokenizer.json has decoder {found}; text generation supports ByteLevel, Metaspace, and sequences "
        "of Replace, ByteFallback, Fuse and Strip (one character on the left)"
    )


def _byte_alphabet() -> dict[str, int]:
    """The GPT-2 byte alphabet: printable Latin-1 stands for itself, the rest for U+0100 and up.

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet


_BYTE_OF_CHAR = _byte_alphabet()
