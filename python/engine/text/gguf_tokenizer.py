"""The tokenizer that a GGUF file describes in its metadata.

Source: llama.cpp's src/llama-vocab.cpp for what the names of pre-tokenizers mean, and the tokenizer.json
files of the models that they are named after.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from engine.errors import CheckpointError
from engine.gguf_file import GGUFFile

_CONTROL, _USER_DEFINED = 3, 4  # of the types of tokens
_ENDS = ("eos", "eot", "eom")
_END_SPELLINGS = frozenset(
    ["<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<end_of_turn>", "</s>"]
)
_UNDERLINE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's space
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+{s}"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*{s}"
)
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _with_digits(most: str) -> str:
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+"
    return rf"{_CONTRACTIONS}|{words}|\p{{N}}{most}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


def _with_case(suffix: str, most: str) -> str:
    words = _CASED_WORDS.replace("{s}", suffix)
    return rf"{words}|\p{{N}}{most}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


_LLAMA3 = _with_digits("{1,3}")
_QWEN2 = _with_digits("")
_SPLITS: Mapping[str, str] = MappingProxyType(
    {
        "llama3": _LLAMA3,
        "llama-v3": _LLAMA3,
        "llama-bpe": _LLAMA3,
        "falcon3": _LLAMA3,
        "smaug-bpe": _LLAMA3,
        "dbrx": _LLAMA3,
        "qwen2": _QWEN2,
        "deepseek-r1-qwen": _QWEN2,
        "tekken": _with_case("", ""),
        "gpt-4o": _with_case(f"{_CONTRACTIONS}?", "{1,3}"),
    }
)
"""How byte-level BPE cuts a text before it merges, by tokenizer.ggml.pre."""
_IGNORES_MERGES = frozenset(["llama3", "llama-v3", "llama-bpe", "falcon3", "tekken"])
_GPT2 = frozenset(["gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jina-v2-code"])
_GPT2_DIGITS = frozenset(["smollm", "starcoder", "refact", "command-r", "codeshell"])


@dataclasses.dataclass(frozen=True)
class GGUFTokenizer:
    """What `Tokenizer` is made from."""

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str]
    bos_token_id: int | None
    chat_templates: Mapping[str, str]


def read_gguf_tokenizer(file: GGUFFile) -> GGUFTokenizer:
    """Raises: `CheckpointError`, one line, where the metadata lack something or name what is not supported.

    Cost: some 0.3 s for a byte-level vocabulary of 150,000 tokens; SentencePiece's without merges
    takes longer, since they are found again.
    """
    fields = _Fields(file)
    tokens = fields.list("tokens", str)
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens) or not tokens:
        raise file.error("has a token twice, or none at all")
    kind = fields.one("model", str)
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        supported = ", ".join(builders)
        raise file.error(
            f"tokenizer {kind!r:.80} is not supported (supported: {supported}); "
            "serve the model from a directory in Hugging Face format"
        )
    try:
        backend = builders[kind](fields, vocab)
    except CheckpointError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise file.error(
            f"has a tokenizer that cannot be built: {' '.join(str(error).split())[:200]}"
        ) from None
    ids = {name: fields.token_id(name, len(tokens)) for name in ("bos", "eos", "unknown", "padding")}
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    special = {names[name]: tokens[i] for name, i in ids.items() if i is not None}
    _add_tokens(backend, tokens, fields)
    _add_template(backend, fields, tokens, ids["bos"], ids["eos"], is_sentencepiece=kind == "llama")
    template = file.metadata.get("tokenizer.chat_template", "")
    if not isinstance(template, str):
        raise file.error(f"has {template!r:.80} for tokenizer.chat_template")
    return GGUFTokenizer(backend, special, ids["bos"], {"default": template} if template else {})


def end_token_ids(file: GGUFFile) -> list[int]:
    """Tokens that end an answer: those that the metadata name, and control tokens of known spellings."""
    metadata = file.metadata
    found = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in _ENDS]
    for value in found:
        if value is not None and (type(value) is not int or value < 0):
            raise file.error(f"has {value!r:.80} for a token that ends an answer")
    tokens = metadata.get("tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type")
    if isinstance(tokens, list) and isinstance(types, list):
        pairs = enumerate(zip(tokens, types, strict=False))
        found += [i for i, (token, kind) in pairs if kind == _CONTROL and token in _END_SPELLINGS]
    return list(dict.fromkeys(i for i in found if i is not None))


class _Fields:
    """The metadata below tokenizer.ggml, with their types checked."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file

    def one(self, name: str, kind: type, default: Any = None) -> Any:
        value = self.file.metadata.get(f"tokenizer.ggml.{name}", default)
        if value is None:
            raise self.file.error(f"has no tokenizer: it lacks tokenizer.ggml.{name}")
        if type(value) is not kind:
            raise self.file.error(f"has {value!r:.80} for tokenizer.ggml.{name}")
        return value

    def has(self, name: str) -> bool:
        return f"tokenizer.ggml.{name}" in self.file.metadata

    def list(self, name: str, kind: type) -> Sequence[Any]:
        values = self.one(name, list)
        if values and type(values[0]) is not kind:  # a list has one kind
            raise self.file.error(f"has a list of something else for tokenizer.ggml.{name}")
        return values

    def token_id(self, name: str, num_tokens: int) -> int | None:
        if not self.has(f"{name}_token_id"):
            return None
        value = self.one(f"{name}_token_id", int)
        if not 0 <= value < num_tokens:
            raise self.file.error(f"has {value} for tokenizer.ggml.{name}_token_id of {num_tokens} tokens")
        return value


def _byte_level(fields: _Fields, vocab: Mapping[str, int]) -> tokenizers.Tokenizer:
    name = fields.one("pre", str, "default")
    merges = [tuple(merge.split(" ", 1)) for merge in fields.list("merges", str)]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    with_regex = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in _SPLITS:
        split = pre_tokenizers.Split(Regex(_SPLITS[name]), behavior="isolated")
        cut = pre_tokenizers.Sequence([split, byte_level])
    elif name in _GPT2:
        cut = with_regex
    elif name in _GPT2_DIGITS:
        cut = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), with_regex])
    else:
        known = ", ".join(sorted({*_SPLITS, *_GPT2, *_GPT2_DIGITS}))
        raise fields.file.error(
            f"pre-tokenizer {name!r:.80} is not known (known: {known}); "
            "serve the model from a directory in Hugging Face format"
        )
    backend = tokenizers.Tokenizer(models.BPE(dict(vocab), merges, ignore_merges=name in _IGNORES_MERGES))
    if _SPLITS.get(name) == _QWEN2:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer, backend.decoder = cut, decoders.ByteLevel()
    return backend


def _sentencepiece(fields: _Fields, vocab: Mapping[str, int]) -> tokenizers.Tokenizer:
    scores = fields.list("scores", float)
    if len(scores) != len(vocab):
        raise fields.file.error(f"has {len(scores)} scores for {len(vocab)} tokens")
    unknown = fields.token_id("unknown", len(vocab))
    backend = tokenizers.Tokenizer(
        models.BPE(
            dict(vocab),
            _merges(vocab, scores),
            unk_token=None if unknown is None else list(vocab)[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    marks = [normalizers.Replace(" ", _UNDERLINE)]
    steps = [decoders.Replace(_UNDERLINE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.one("add_space_prefix", bool, True):
        marks.insert(0, normalizers.Prepend(_UNDERLINE))
        steps.append(decoders.Strip(" ", 1, 0))
    backend.normalizer, backend.decoder = normalizers.Sequence(marks), decoders.Sequence(steps)
    return backend


def _merges(vocab: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Pairs of tokens that make a token, best first: SentencePiece merges whatever makes the best token."""
    ranked = sorted(vocab, key=lambda token: -scores[vocab[token]])  # equal scores in order of ids
    merges = []
    for token in ranked:
        pairs = ((token[:at], token[at:]) for at in range(1, len(token)))
        known = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
        merges += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return merges


def _add_tokens(backend: tokenizers.Tokenizer, tokens: Sequence[str], fields: _Fields) -> None:
    """Tokens that are found in a text before it is cut: control tokens, and those that a user defined."""
    if not fields.has("token_type"):
        return
    types = fields.list("token_type", int)
    added = [(token, kind) for token, kind in zip(tokens, types, strict=False) if token]
    special = [AddedToken(t, special=True, normalized=False) for t, kind in added if kind == _CONTROL]
    defined = [AddedToken(t, special=False, normalized=False) for t, kind in added if kind == _USER_DEFINED]
    backend.add_special_tokens(special)
    backend.add_tokens(defined)


def _add_template(
    backend: tokenizers.Tokenizer,
    fields: _Fields,
    tokens: Sequence[str],
    bos: int | None,
    eos: int | None,
    *,
    is_sentencepiece: bool,
) -> None:
    """What goes before and after a text. Files that do not say add <s> to SentencePiece's alone."""
    pieces, special = ["$A"], []
    if bos is not None and fields.one("add_bos_token", bool, is_sentencepiece):
        pieces.insert(0, tokens[bos])
        special.append((tokens[bos], bos))
    if eos is not None and fields.one("add_eos_token", bool, False):
        pieces.append(tokens[eos])
        special.append((tokens[eos], eos))
    if special:
        post = processors.TemplateProcessing(single=pieces, special_tokens=list(dict.fromkeys(special)))
        if not is_sentencepiece:
            post = processors.Sequence([processors.ByteLevel(trim_offsets=False), post])
        backend.post_processor = post
