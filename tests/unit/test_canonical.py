"""Forced text is cut into the fewest tokens of the vocabulary, whatever a tokenizer would cut it into."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from engine.grammar.matcher import ConstraintMatcher
from engine.grammar.trial import MAX_FORCED_BYTES
from engine.grammar.vocabulary import MAX_REMEMBERED_BYTES, Vocabulary, VocabularyData
from engine.text.tokenizer import Tokenizer
from helpers.grammars import Grammars
from helpers.tokenizers import SENTENCES

CAPITALS = [
    "NATO and the USA, HTTP and JSON; I AM HERE, he said, and a JSON answer of the USA.",
    "The NATO of the USA sends JSON over HTTP. iPhone, eBay, McDonald, ABc, aBC.",
]
TEXTS = [
    "NATO",
    " NATO and the USA",
    "USAUSA",
    "JSON over HTTP",
    "I AM",
    "iPhone ABc aBC",
    "A",
    " A",
    "ÀÉ NATO",
    "日本 USA",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Of a word in capitals each letter is a token of its own."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(" ?[A-Z](?=[A-Z])|(?<=[A-Z])[A-Z]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        show_progress=False,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(SENTENCES + 5 * CAPITALS, trainer)
    directory = tmp_path_factory.mktemp("capitals")
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    return Tokenizer.from_directory(Path(directory))


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(VocabularyData.from_tokenizer(tokenizer, tokenizer.vocab_size))


def fewest(vocabulary: Vocabulary, text: bytes) -> int:
    """The number of tokens, worked out from the front."""
    tokens = {token for token in vocabulary.tokens if token}
    longest = max(map(len, tokens))
    best = [0] + [len(text) + 1] * len(text)
    for end in range(1, len(text) + 1):
        starts = range(max(0, end - longest), end)
        best[end] = min(best[start] + 1 for start in starts if text[start:end] in tokens)
    return best[-1]


@given(st.text(alphabet="NATOUSJHPaeo n,AB", max_size=30))
def test_the_fewest_tokens(grammars: Grammars, text: str) -> None:
    vocabulary, spelled = grammars.vocabulary, text.encode()
    token_ids = vocabulary.canonical(spelled)
    assert b"".join(vocabulary.tokens[i] for i in token_ids) == spelled
    assert len(token_ids) == fewest(vocabulary, spelled)


@pytest.mark.parametrize("text", TEXTS)
def test_words_in_capitals(grammars: Grammars, tokenizer: Tokenizer, text: str) -> None:
    for kind, constraint in (
        ("choice", json.dumps([text])),
        ("json_schema", {"const": text}),
        ("json_schema", {"type": "object", "properties": {text: {"enum": [text]}}, "required": [text]}),
        ("regex", text),
    ):
        spelled = {
            "choice": text,
            "regex": text,
            "json_schema": json.dumps(text, ensure_ascii=False),
        }[kind]
        if isinstance(constraint, dict) and "properties" in constraint:
            spelled = f"{{{spelled}:{spelled}}}"
        matcher = ConstraintMatcher(grammars.compile(kind, constraint), [grammars.end_id])
        *token_ids, end_id = matcher.forced
        assert end_id == grammars.end_id and matcher.is_over is False
        assert tokenizer.decode(token_ids) == spelled
        assert tuple(token_ids) == grammars.vocabulary.canonical(spelled.encode())
        assert len(token_ids) == fewest(grammars.vocabulary, spelled.encode())


def test_long_texts(grammars: Grammars) -> None:
    """There is no border within them: what is cut a piece at a time takes more tokens."""
    vocabulary, draw, more = grammars.vocabulary, random.Random(0), 0
    for num_bytes in (300, 600, 2000, 5000, MAX_FORCED_BYTES):
        words = [draw.choice([*TEXTS, *SENTENCES, *CAPITALS]) for _ in range(num_bytes)]
        text = " ".join(words).encode()[:num_bytes].decode(errors="ignore")
        spelled = text.encode()
        matcher = ConstraintMatcher(grammars.compile("choice", json.dumps([text])), [grammars.end_id])
        *token_ids, end_id = matcher.forced
        assert end_id == grammars.end_id
        assert b"".join(vocabulary.tokens[i] for i in token_ids) == spelled
        assert len(token_ids) == fewest(vocabulary, spelled)
        pieces = [spelled[i : i + 512] for i in range(0, len(spelled), 512)]
        more += sum(len(vocabulary.canonical(piece)) for piece in pieces) > len(token_ids)
    assert more > 1


def test_no_more_is_remembered_than_has_room(grammars: Grammars) -> None:
    vocabulary = grammars.vocabulary
    for number in range(30):
        text = f"{number} NATO and the USA, ".encode() * 3000
        assert b"".join(vocabulary.tokens[i] for i in vocabulary.canonical(text)) == text
        assert sum(map(len, vocabulary._canonical)) <= MAX_REMEMBERED_BYTES
    assert 1 < len(vocabulary._canonical) < 30


def test_letters_of_such_words_are_tokens_of_their_own(grammars: Grammars, tokenizer: Tokenizer) -> None:
    """And forced ones are those that the model was taught."""
    for text in ("NATO", " NATO", "USA", " HTTP", " JSON"):
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        assert len(token_ids) == len(text.strip())
        assert grammars.vocabulary.canonical(text.encode()) == tuple(token_ids)


def test_the_last_token_is_open_where_a_longer_one_may_come(grammars: Grammars) -> None:
    """Behind text in capitals, for each token of letters: its first one forced, the others allowed."""
    vocabulary = grammars.vocabulary
    words = [token.decode() for token in vocabulary.tokens if token.isalpha() and token.isascii()]
    num_open = 0
    for word in words:
        text = f"USA{word[0]}"
        matcher = ConstraintMatcher(grammars.compile("regex", f"{text}({word[1:]}Q)?"), [grammars.end_id])
        *head, last = vocabulary.canonical(text.encode())
        may_come = f"{text}{word[1:]}Q".encode()[len(text) - len(vocabulary.tokens[last]) :]
        is_open = any(
            may_come.startswith(token) and len(token) > len(vocabulary.tokens[last])
            for token in vocabulary.tokens
        )
        assert list(matcher.forced) == (head if is_open else [*head, last])
        num_open += is_open
    assert 10 < num_open < len(words)
