"""Text to token ids and back, from the files of a Hugging Face checkpoint."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from engine.errors import ConfigError, InvalidRequest
from engine.gguf_file import GGUFFile, is_gguf
from engine.text.gguf_tokenizer import end_token_ids, read_gguf_tokenizer
from engine.text.token_decoding import Piece, TokenDecoding


class Tokenizer:
    """A fast tokenizer, its special tokens and its chat templates. Safe to share between threads.

    Ids, bytes and text are those of `transformers`' fast tokenizers for the same directory, with
    two differences: a special token that tokenizer.json does not hold is ignored (the model has no
    row for it), and `clean_up_tokenization_spaces` is never applied (it alters text).

    `vocab_size` counts added tokens and bounds every id. `eos_token_ids` is the union of what the
    tokenizer, generation_config.json and config.json say. `add_bos_token` tells whether `encode`
    puts the bos token first. `special_tokens` maps names ("bos_token") to texts, for chat
    templates; `chat_templates` maps names to template sources and is empty for base models.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        bos_token_id: int | None,
        eos_token_ids: Iterable[int],
        chat_templates: Mapping[str, str],
    ) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self.vocab_size: int = max(backend.get_vocab().values(), default=-1) + 1
        self.special_ids: frozenset[int] = frozenset(i for i, token in added.items() if token.special)
        self.special_tokens: Mapping[str, str] = dict(special_tokens)
        self.bos_token: str | None = self.special_tokens.get("bos_token")
        self.bos_token_id: int | None = bos_token_id
        self.eos_token: str | None = self.special_tokens.get("eos_token")
        self.eos_token_ids: frozenset[int] = frozenset(eos_token_ids)
        self.chat_templates: Mapping[str, str] = dict(chat_templates)
        self.add_bos_token: bool = bos_token_id is not None and self.encode("")[:1] == [bos_token_id]
        self._pieces: dict[int, Piece | None] = {}
        self._texts: dict[int, str | None] = {}

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> Tokenizer:
        """From a directory, or from the metadata of a GGUF file. Raises: `ConfigError`, one line."""
        if not is_gguf(path):
            return cls.from_directory(path)
        file = GGUFFile(path)
        parts = read_gguf_tokenizer(file)
        return cls(
            parts.backend,
            special_tokens=parts.special_tokens,
            bos_token_id=parts.bos_token_id,
            eos_token_ids=end_token_ids(file),
            chat_templates=parts.chat_templates,
        )

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Load tokenizer.json and what stands beside it.

        Raises: `ConfigError` naming the directory, for missing or unreadable files.
        """
        directory = Path(path)
        backend = _load_backend(directory)
        config = _read_json(directory, "tokenizer_config.json")
        if "added_tokens_decoder" not in config:  # the older layout keeps names in a file of their own
            config = {**config, **_read_json(directory, "special_tokens_map.json")}
        named, unnamed = _special_tokens(config)
        _mark_special(backend, [*named.values(), *unnamed])

        model_configs = [_read_json(directory, name) for name in ("generation_config.json", "config.json")]
        bos_ids = _ids(directory, backend, named.get("bos_token"), model_configs, "bos_token_id")
        eos_ids = _ids(directory, backend, named.get("eos_token"), model_configs, "eos_token_id")
        return cls(
            backend,
            special_tokens=named,
            bos_token_id=bos_ids[0] if bos_ids else None,
            eos_token_ids=eos_ids,
            chat_templates=_chat_templates(directory, config),
        )

    def truncated(self, max_len: int) -> Tokenizer:
        """A copy whose encodings have at most `max_len` tokens: the end of the text goes."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.enable_truncation(max_len)
        copied = copy.copy(self)
        copied._backend = backend
        return copied

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens spelled out in the text become those tokens.

        Pass `add_special_tokens=False` for rendered chat templates: they write their own.
        Effects: releases the interpreter lock.
        Raises: `InvalidRequest` if the text is not valid Unicode (a lone surrogate).
        """
        (ids,) = self.encode_batch([text], add_special_tokens)
        return ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """As `encode`, for many texts at once."""
        try:
            # Unlike `encode`, this releases the lock; it also spares the offsets, half of the time.
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
            return [encoding.ids for encoding in encodings]
        except TypeError:
            # The library says only that it wants a str; a str it refuses has a lone surrogate.
            if not all(isinstance(text, str) for text in texts):
                raise
            raise InvalidRequest("Invalid request: text holds an unpaired surrogate character") from None

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], int]]:
        """Token ids of each pair as the model reads it, and where the tokens of type 1 begin in them.

        Raises: `InvalidRequest` if a text is not valid Unicode.
        """
        try:
            encodings = self._backend.encode_batch_fast(list(pairs))
        except TypeError:
            raise InvalidRequest("Invalid request: text holds an unpaired surrogate character") from None
        return [
            (encoding.ids, encoding.type_ids.index(1) if 1 in encoding.type_ids else len(encoding.ids))
            for encoding in encodings
        ]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence. Incomplete characters become U+FFFD; unknown ids add nothing."""
        known = [int(i) for i in ids if 0 <= i < self.vocab_size]
        return self._backend.decode(known, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for; empty for an unknown id.

        The leading space that a word carries is kept, whatever decoding a sequence does with it.
        """
        piece = self.piece(token_id)
        if piece is None:
            return b""
        return piece if isinstance(piece, bytes) else piece.encode()

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, with U+FFFD for what is not a character on its own."""
        return self.token_bytes(token_id).decode(errors="replace")

    def token_id(self, token: str) -> int | None:
        """Id of a token as spelled in the vocabulary, or None."""
        return self._backend.token_to_id(token)

    def blank_ids(self, num_ids: int) -> frozenset[int]:
        """Ids below `num_ids` whose text is ASCII white space, or that have none.

        Raises: `ConfigError` if there is no telling. Cost: 1 us a token.
        """
        with_text = set()
        for token, token_id in self._backend.get_vocab().items():
            piece = self.decoding.piece(token)
            if (piece if isinstance(piece, bytes) else piece.encode()).strip():
                with_text.add(token_id)
        return frozenset(range(num_ids)) - with_text

    def is_known(self, token_id: int) -> bool:
        """Whether the vocabulary has a token with this id (models often have rows to spare)."""
        return self._spelling(token_id) is not None

    @functools.cached_property
    def decoding(self) -> TokenDecoding:
        """How tokens become text one by one. Raises: `ConfigError` for an unsupported decoder."""
        decoder = self._backend.decoder
        return TokenDecoding.parse(json.loads(decoder.__getstate__()) if decoder else None)

    def piece(self, token_id: int) -> Piece | None:
        """What a token contributes to decoded text, or None for an unknown id. Cached."""
        try:
            return self._pieces[token_id]
        except KeyError:
            pass
        token = self._spelling(token_id)
        if token is None:
            return None  # not cached: there are more unknown ids than tokens
        piece = self.decoding.piece(token)
        self._pieces[token_id] = piece
        return piece

    def whole_text(self, token_id: int) -> str | None:
        """What a token contributes, if that is characters whatever its neighbours are; else None. Cached."""
        try:
            return self._texts[token_id]
        except KeyError:
            pass
        text = self.piece(token_id)
        if text is None:
            return None
        if isinstance(text, bytes):
            try:
                text = text.decode() if self.decoding.byte_level else None
            except UnicodeDecodeError:
                text = None
        self._texts[token_id] = text
        return text

    def first_piece(self, token_id: int) -> Piece | None:
        """Like `piece`, for a token that nothing precedes."""
        token = self._spelling(token_id)
        return None if token is None else self.decoding.piece(token, first=True)

    def _spelling(self, token_id: int) -> str | None:
        return self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None


def _load_backend(directory: Path) -> tokenizers.Tokenizer:
    file = directory / "tokenizer.json"
    if not directory.is_dir():
        raise ConfigError(f"tokenizer: no directory {str(directory)!r}")
    if not file.is_file():
        raise ConfigError(
            f"tokenizer: {str(directory)!r} has no tokenizer.json (only fast tokenizers are supported; "
            "save it with transformers' save_pretrained to get one)"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(
            f"tokenizer: {str(directory)!r} has a tokenizer.json that cannot be read: {_one_line(error)}"
        ) from None
    # Some checkpoints carry the truncation and padding of their training.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_json(directory: Path, name: str) -> dict[str, Any]:
    """A JSON object from a file that may be missing."""
    try:
        data = json.loads((directory / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        message = f"tokenizer: {str(directory)!r} has a {name} that cannot be read: {_one_line(error)}"
        raise ConfigError(message) from None
    if not isinstance(data, dict):
        raise ConfigError(f"tokenizer: {str(directory)!r} has a {name} that is not a JSON object")
    return data


def _special_tokens(config: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Special tokens with a name ("eos_token", model-specific ones too), and those without."""
    named = {key: text for key, value in config.items() if key.endswith("_token") and (text := _text(value))}
    unnamed: list[str] = []
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        named |= {key: text for key, value in extra.items() if (text := _text(value))}
    elif isinstance(extra, list):
        unnamed = [text for value in extra if (text := _text(value))]
    return named, unnamed


def _mark_special(backend: tokenizers.Tokenizer, texts: Iterable[str]) -> None:
    """Make tokens special that the configuration names and tokenizer.json holds as ordinary ones."""
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    known = (text for text in texts if text not in special and backend.token_to_id(text) is not None)
    backend.add_special_tokens(list(known))


def _text(token: Any) -> str | None:
    """A token is written as a string or as an object with its flags."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) and content else None


def _ids(
    directory: Path,
    backend: tokenizers.Tokenizer,
    token: str | None,
    model_configs: Sequence[Mapping[str, Any]],
    key: str,
) -> list[int]:
    """Ids for bos or eos: the tokenizer's own first, then those of the model's files."""
    found = [] if token is None else [backend.token_to_id(token)]
    for config in model_configs:
        value = config.get(key)
        values = value if isinstance(value, list) else [value]
        if not all(v is None or (type(v) is int and v >= 0) for v in values):
            raise ConfigError(f"tokenizer: {str(directory)!r} has a {key} that is not a token id: {value!r}")
        found += values
    return [i for i in dict.fromkeys(found) if i is not None]


def _chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name. Files of their own win over the entry in tokenizer_config.json."""
    files = {"default": directory / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    try:
        found = {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}
    except (OSError, ValueError) as error:
        message = f"tokenizer: {str(directory)!r} has a chat template that cannot be read: {_one_line(error)}"
        raise ConfigError(message) from None
    if found:
        return found
    entry = config.get("chat_template")
    if entry is None:
        return {}
    if isinstance(entry, str):
        return {"default": entry}
    try:
        templates = {item["name"]: item["template"] for item in entry}
        if all(isinstance(text, str) for pair in templates.items() for text in pair):
            return templates
    except (TypeError, KeyError):
        pass
    raise ConfigError(
        f"tokenizer: {str(directory)!r} has a chat_template in tokenizer_config.json that is neither a "
        "string nor a list of {name, template}"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
