"""The tokenizer against transformers, and its reading of checkpoint files."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import transformers

from engine.errors import ConfigError, InvalidRequest
from engine.text.tokenizer import Tokenizer
from helpers.tokenizers import (
    SENTENCES,
    byte_level_tokenizer,
    metaspace_tokenizer,
    save_tokenizer,
    sentencepiece_tokenizer,
)

BACKENDS = {
    "byte_level": byte_level_tokenizer,
    "sentencepiece": sentencepiece_tokenizer,
    "metaspace": metaspace_tokenizer,
}
CONFIGS = {
    "byte_level": {
        "bos_token": "<|begin|>",
        "eos_token": {"__type": "AddedToken", "content": "<|end|>", "special": True},
    },
    "sentencepiece": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "metaspace": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
}
TEXTS = [
    *SENTENCES,
    "",
    " ",
    "  leading and trailing  ",
    "a\n\n\tb\x00c",
    "日本語 ﷽ 👩‍👩‍👧 e\u0301 \u200b",
    "<s> hi </s><|end|> <tool> é <unk>",
    "x" * 300,
]


@pytest.fixture(scope="module", params=list(BACKENDS))
def pair(request, tmp_path_factory):
    """The same directory read by us and by transformers."""
    kind = request.param
    directory = save_tokenizer(BACKENDS[kind](), tmp_path_factory.mktemp(kind), config=CONFIGS[kind])
    return Tokenizer.from_directory(directory), transformers.AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_ids_and_text_are_those_of_transformers(pair, add_special_tokens):
    ours, theirs = pair
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens)
        assert ids == theirs.encode(text, add_special_tokens=add_special_tokens)
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_special_tokens_are_those_of_transformers(pair):
    ours, theirs = pair
    assert ours.vocab_size == len(theirs)
    assert ours.special_ids == set(theirs.all_special_ids)
    assert ours.special_tokens == theirs.special_tokens_map
    assert (ours.bos_token, ours.bos_token_id) == (theirs.bos_token, theirs.bos_token_id)
    assert ours.eos_token_ids == {theirs.eos_token_id}


def test_bytes_of_tokens_join_to_the_text(pair):
    ours, _ = pair
    for text in SENTENCES:
        ids = ours.encode(text, add_special_tokens=False)
        if 0 in ids and ours.token_text(0) == "<unk>":
            continue  # the Unigram vocabulary has no bytes to fall back to
        assert b"".join(map(ours.token_bytes, ids)).decode().lstrip(" ") == text


def test_bytes_and_text_of_single_tokens():
    ours = _tokenizer(byte_level_tokenizer())
    first, *_, last = (ours.token_bytes(i) for i in ours.encode("佢"))
    assert first[:1] == b"\xe4"
    assert last[-1:] == b"\xa2"
    (space,) = ours.encode(" ")
    assert (ours.token_bytes(space), ours.token_text(space)) == (b" ", " ")
    assert ours.token_bytes(0) == b"<|begin|>"
    assert ours.token_bytes(ours.token_id("<tool> é")) == "<tool> é".encode()

    ours = _tokenizer(sentencepiece_tokenizer())
    assert ours.token_bytes(ours.token_id("<0x0A>")) == b"\n"
    assert ours.token_text(ours.token_id("<0xE4>")) == "\ufffd"
    assert ours.token_text(ours.token_id("▁")) == " "
    for unknown in (-1, ours.vocab_size, 2**70):
        assert ours.token_bytes(unknown) == b""
        assert ours.token_text(unknown) == ""
        assert not ours.is_known(unknown)
        assert ours.decode([unknown]) == ""
    assert ours.is_known(ours.vocab_size - 1)


@pytest.mark.parametrize("kind", BACKENDS)
def test_every_token_has_the_bytes_that_decoding_gives_it(kind):
    """Decoded behind a neutral token, so that nothing is stripped; broken UTF-8 becomes U+FFFD in both."""
    ours = _tokenizer(BACKENDS[kind]())
    front = ours.encode("a", add_special_tokens=False)
    front_text = ours.decode(front, skip_special_tokens=False)
    for token_id in range(ours.vocab_size):
        whole = ours.decode([*front, token_id], skip_special_tokens=False)
        assert whole == front_text + ours.token_text(token_id)


def test_eos_and_bos_come_from_all_files(tmp_path):
    save_tokenizer(
        byte_level_tokenizer(),
        tmp_path,
        config={"eos_token": "<|end|>"},
        generation_config={"eos_token_id": [5, 1], "bos_token_id": None},
    )
    (tmp_path / "config.json").write_text('{"eos_token_id": 7, "bos_token_id": 0}')
    ours = Tokenizer.from_directory(tmp_path)
    assert ours.eos_token_ids == {1, 5, 7}
    assert (ours.bos_token, ours.bos_token_id) == (None, 0)
    assert not ours.add_bos_token


def test_add_bos_token_says_what_encode_does(tmp_path):
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}
    ours = Tokenizer.from_directory(save_tokenizer(sentencepiece_tokenizer(), tmp_path, config=config))
    # tokenizer.json decides, as in transformers.
    assert ours.add_bos_token
    assert ours.encode("hi")[0] == ours.bos_token_id == 1
    assert ours.encode("hi", add_special_tokens=False)[0] != 1


def test_named_tokens_become_special_and_unknown_ones_are_ignored(tmp_path):
    config = {"eos_token": "capital", "additional_special_tokens": ["<tool> é"], "pad_token": "<absent>"}
    backend = byte_level_tokenizer()
    backend.add_tokens(["capital"])
    save_tokenizer(backend, tmp_path, config={"eos_token": "x"}, special_tokens_map=config)
    ours = Tokenizer.from_directory(tmp_path)
    assert ours.vocab_size == backend.get_vocab_size()
    assert ours.eos_token_ids == {ours.token_id("capital")}
    assert {ours.token_id("<tool> é")} <= ours.special_ids
    assert ours.decode(ours.encode("a <tool> é b")) == "a  b"


def test_truncation_and_padding_of_training_are_off(tmp_path):
    backend = byte_level_tokenizer()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    ours = Tokenizer.from_directory(save_tokenizer(backend, tmp_path))
    assert ours.decode(ours.encode(SENTENCES[0])) == SENTENCES[0]


def test_other_threads_run_while_a_long_text_is_encoded():
    tokenizer = _tokenizer(byte_level_tokenizer())

    def count_turns() -> int:
        with ThreadPoolExecutor(1) as pool:
            encoded = pool.submit(tokenizer.encode, "to be or not " * 50_000)
            num_turns = 0
            while not encoded.done():
                num_turns += 1
                time.sleep(0.001)
        assert len(encoded.result()) > 50_000
        return num_turns

    # Where others took the core from this thread, it has fewer turns, but not each time.
    assert any(count_turns() > 10 for _ in range(5)), "the interpreter lock was held"


def test_a_lone_surrogate_is_refused():
    with pytest.raises(InvalidRequest, match="surrogate"):
        _tokenizer(byte_level_tokenizer()).encode("ok \ud800")


def test_templates_are_found_in_every_place(tmp_path):
    directory = save_tokenizer(byte_level_tokenizer(), tmp_path)
    config_file = directory / "tokenizer_config.json"
    assert Tokenizer.from_directory(directory).chat_templates == {}
    config_file.write_text(json.dumps({"chat_template": "one"}))
    assert Tokenizer.from_directory(directory).chat_templates == {"default": "one"}
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    config_file.write_text(json.dumps({"chat_template": named}))
    assert Tokenizer.from_directory(directory).chat_templates == {"default": "a", "tool_use": "b"}
    (directory / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_directory(directory).chat_templates == {"default": "file"}
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("more")
    ours = Tokenizer.from_directory(directory).chat_templates
    assert ours == {"default": "file", "tool_use": "more"}
    assert ours == transformers.AutoTokenizer.from_pretrained(directory).chat_template


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", "{", "tokenizer.json that cannot be read"),
        ("tokenizer.json", '{"model": {"type": "Nothing"}}', "tokenizer.json that cannot be read"),
        ("tokenizer_config.json", "{'a': 1}", "tokenizer_config.json that cannot be read"),
        ("tokenizer_config.json", "[1]", "not a JSON object"),
        ("tokenizer_config.json", "[" * 100_000, "tokenizer_config.json that cannot be read"),
        ("tokenizer_config.json", '{"chat_template": 5}', "chat_template"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}', "chat_template"),
        ("generation_config.json", b"\xff\xfe{", "generation_config.json that cannot be read"),
        ("generation_config.json", '{"eos_token_id": "two"}', "eos_token_id"),
        ("config.json", '{"bos_token_id": -1}', "bos_token_id"),
        ("chat_template.jinja", b"\xff", "chat template"),
    ],
)
def test_broken_files_are_named_in_one_line(tmp_path, file, content, expected):
    save_tokenizer(byte_level_tokenizer(), tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as error:
        Tokenizer.from_directory(tmp_path)
    assert expected in error.value.message
    assert str(tmp_path) in error.value.message
    assert "\n" not in error.value.message


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        Tokenizer.from_directory(tmp_path / "nowhere")


def _tokenizer(backend) -> Tokenizer:
    return Tokenizer(backend, special_tokens={}, bos_token_id=None, eos_token_ids=(), chat_templates={})
