"""Tokenizers out of GGUF metadata give the ids and texts of the tokenizers that went in."""

from __future__ import annotations

import json

import gguf
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers

from engine.config.model_location import bundled_model
from engine.errors import CheckpointError
from engine.text.detokenizer import IncrementalDetokenizer
from engine.text.tokenizer import Tokenizer
from helpers.gguf_files import add_tokenizer, add_value
from helpers.tokenizers import SENTENCES, byte_level_tokenizer, sentencepiece_tokenizer

TEXTS = [
    *SENTENCES,
    "",
    " ",
    "  two  spaces\n\n\ttab ",
    "I'M we'LL don't 1234567 12 3",
    "HelloWorld fooBar ÀÉîö ﬁ e\u0301",
    "<s>raw</s> <|end|> x <tool> é y",
    "a\r\nb \r\n\r\n c/d///",
]
PUBLISHED = {
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt-4o": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
"""As in the tokenizer.json files of the models."""


def write(path, fill) -> Tokenizer:
    writer = gguf.GGUFWriter(path, "llama")
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Tokenizer.from_checkpoint(path)


def from_byte_level(path, tokenizer, pre="gpt-2", **metadata) -> Tokenizer:
    def fill(writer):
        add_tokenizer(writer, tokenizer, pre)
        for key, value in metadata.items():
            add_value(writer, f"tokenizer.{key.replace('__', '.')}", value)

    return write(path, fill)


def trained(pre: str) -> tokenizers.Tokenizer:
    """A tokenizer that cuts as published, with merges across whatever may stand side by side."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=pre in ("llama-bpe", "tekken")))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PUBLISHED[pre]), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def assert_same(ours: Tokenizer, theirs: tokenizers.Tokenizer, texts) -> None:
    for text in texts:
        ids = theirs.encode(text).ids
        assert ours.encode(text) == ids, text
        assert (
            ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False).ids
        )
        assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("pre", PUBLISHED)
def test_every_way_of_cutting(tmp_path, pre):
    theirs = trained(pre)
    assert_same(from_byte_level(tmp_path / "t.gguf", theirs, pre), theirs, TEXTS)


def test_byte_level_with_added_tokens(tmp_path):
    theirs = byte_level_tokenizer()
    ours = from_byte_level(tmp_path / "t.gguf", theirs)
    assert_same(ours, theirs, TEXTS)
    assert ours.special_ids == {0, 1}
    assert ours.vocab_size == theirs.get_vocab_size()
    assert ours.eos_token_ids == {1, 2}  # what the file says, and <|end|> by its spelling
    assert not ours.add_bos_token and ours.chat_templates == {}


def test_the_bundled_tokenizer_with_its_template(tmp_path):
    theirs = Tokenizer.from_directory(bundled_model())
    backend = tokenizers.Tokenizer.from_file(str(bundled_model() / "tokenizer.json"))
    template = theirs.chat_templates["default"]
    ours = from_byte_level(tmp_path / "t.gguf", backend, "smollm", chat_template=template)
    assert_same(ours, backend, TEXTS)
    assert ours.chat_templates == theirs.chat_templates
    assert ours.eos_token_ids == theirs.eos_token_ids == {0, 2}  # the second by its spelling
    assert ours.eos_token == theirs.eos_token == "<|im_end|>"


def test_bos_is_put_first_where_the_file_says_so(tmp_path):
    options = {"ggml__bos_token_id": 0, "ggml__add_bos_token": True}
    ours = from_byte_level(tmp_path / "t.gguf", byte_level_tokenizer(), **options)
    assert ours.add_bos_token and ours.encode("a")[0] == 0 and ours.bos_token == "<|begin|>"
    assert ours.encode("a", add_special_tokens=False)[0] != 0
    options |= {"ggml__add_eos_token": True}
    ours = from_byte_level(tmp_path / "u.gguf", byte_level_tokenizer(), **options)
    assert ours.encode("a")[-1] == 2


# --- SentencePiece -------------------------------------------------------------------------------


def fill_sentencepiece(writer, tokenizer: tokenizers.Tokenizer, **changes) -> None:
    """Scores fall with the order of merges, as SentencePiece's do."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    ranks = {left + right: rank for rank, (left, right) in reversed(list(enumerate(model["merges"])))}
    kinds = {"<unk>": gguf.TokenType.UNKNOWN, "<s>": gguf.TokenType.CONTROL, "</s>": gguf.TokenType.CONTROL}
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(ranks.get(token, 10_000)) for token in tokens])
    writer.add_token_types(
        [
            gguf.TokenType.BYTE if token.startswith("<0x") else kinds.get(token, gguf.TokenType.NORMAL)
            for token in tokens
        ]
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for key, value in changes.items():
        add_value(writer, f"tokenizer.ggml.{key}", value)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    theirs = sentencepiece_tokenizer()
    path = tmp_path_factory.mktemp("spm") / "t.gguf"
    return write(path, lambda writer: fill_sentencepiece(writer, theirs)), theirs


def test_sentencepiece(sentencepiece):
    ours, theirs = sentencepiece
    assert_same(ours, theirs, [text for text in TEXTS if "<s>" not in text])
    assert (ours.bos_token, ours.eos_token, ours.add_bos_token) == ("<s>", "</s>", True)
    assert ours.encode("x<s>")[-1] == 1


@given(text=st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_sentencepiece_on_any_text(sentencepiece, text):
    ours, theirs = sentencepiece
    assert ours.encode(text) == theirs.encode(text).ids


def test_answers_of_sentencepiece_are_put_together(sentencepiece):
    ours, theirs = sentencepiece
    ids = theirs.encode("Привет, как дела? 🙂 The fox", add_special_tokens=False).ids
    detokenizer = IncrementalDetokenizer(ours)
    text = "".join(detokenizer.push([i]) for i in ids) + detokenizer.finish()
    assert text.strip() == "Привет, как дела? 🙂 The fox"


def test_a_space_in_front_is_optional(tmp_path):
    def fill(writer):
        fill_sentencepiece(writer, sentencepiece_tokenizer(), add_space_prefix=False, add_bos_token=False)

    ours = write(tmp_path / "t.gguf", fill)
    assert ours.decode(ours.encode("the fox")) == "the fox"
    assert ours.token_text(ours.encode("the fox")[0]).startswith("t")


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "t5"}, "tokenizer 't5' is not supported .supported: gpt2, llama."),
        ({"tokenizer.ggml.model": None}, "has no tokenizer: it lacks tokenizer.ggml.model"),
        ({"tokenizer.ggml.pre": "odd"}, "pre-tokenizer 'odd' is not known .*a directory in Hugging Face"),
        ({"tokenizer.ggml.pre": None}, "pre-tokenizer 'default' is not known"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "has a token twice"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "has a list of something else"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "cannot be built"),
        ({"tokenizer.ggml.merges": ["nothing here"]}, "cannot be built"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "has 1000000 for tokenizer.ggml.eos_token_id"),
        ({"tokenizer.ggml.tokens": "text"}, "has 'text' for tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.eot_token_id": [1]}, "has .1. for a token that ends an answer"),
        ({"tokenizer.chat_template": 5}, "has 5 for tokenizer.chat_template"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, message):
    def fill(writer):
        add_tokenizer(writer, byte_level_tokenizer())
        for key, value in change.items():
            writer.kv_data[0].pop(key, None)
            if value is not None:
                add_value(writer, key, value)

    with pytest.raises(CheckpointError, match=message) as caught:
        write(tmp_path / "t.gguf", fill)
    assert "\n" not in caught.value.message and caught.value.message.startswith("t.gguf: ")
