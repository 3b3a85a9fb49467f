"""Incremental detokenization against decoding everything at once."""

from __future__ import annotations

import functools

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from engine.errors import ConfigError
from engine.text.detokenizer import IncrementalDetokenizer
from engine.text.tokenizer import Tokenizer
from helpers.tokenizers import (
    SENTENCES,
    byte_level_tokenizer,
    metaspace_tokenizer,
    sentencepiece_tokenizer,
)

KINDS = ["byte_level", "sentencepiece", "gguf_style", "gemma_style", "metaspace", "metaspace_never"]


@functools.cache
def tokenizer(kind: str) -> Tokenizer:
    if kind == "byte_level":
        backend = byte_level_tokenizer()
    elif kind.startswith("metaspace"):
        backend = metaspace_tokenizer()
        if kind == "metaspace_never":
            backend.decoder = decoders.Metaspace(prepend_scheme="never")
    else:
        backend = sentencepiece_tokenizer()
        mark, byte_runs, fuse = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
        if kind == "gguf_style":
            backend.decoder = decoders.Sequence([byte_runs, fuse, mark, decoders.Strip(" ", 1, 0)])
        elif kind == "gemma_style":
            backend.decoder = decoders.Sequence([mark, byte_runs, fuse])
    return Tokenizer(backend, special_tokens={}, bos_token_id=None, eos_token_ids=(), chat_templates={})


@functools.cache
def byte_token_ids(kind: str) -> dict[int, int]:
    """Token id by byte, for vocabularies that can spell single bytes."""
    ids = [i for i in range(tokenizer(kind).vocab_size) if isinstance(tokenizer(kind).piece(i), bytes)]
    return {piece[0]: i for i in ids if len(piece := tokenizer(kind).piece(i)) == 1}


@st.composite
def token_sequences(draw, kind: str) -> list[int]:
    """Any ids at all (unknown ones too), real text, and, where there are byte tokens, broken UTF-8."""
    tok = tokenizer(kind)
    any_ids = st.lists(st.integers(0, tok.vocab_size + 3), max_size=6)
    text = st.sampled_from(SENTENCES).map(lambda sentence: tok.encode(sentence))
    options = [any_ids, text]
    if by_byte := byte_token_ids(kind):
        characters = st.sampled_from("é你🙂\ufffd▁").map(str.encode)
        broken = st.sampled_from(
            [
                b"\xe4",
                b"\xe4\xbd",
                b"\xa0",
                b"\xf0\x9f",
                b"\x99\x82",
                b"\xff",
                b"\xed\xa0\x80",
                b"\xf4\x90",
                b" ",
            ]
        )
        spelled = st.one_of(characters, broken).map(lambda data: [by_byte[byte] for byte in data])
        options += [spelled, spelled]
    return [i for run in draw(st.lists(st.one_of(options), max_size=6)) for i in run]


@st.composite
def chunked(draw, sequences) -> list[list[int]]:
    ids = draw(sequences)
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=len(ids))))
    bounds = [0, *cuts, len(ids)]
    return [ids[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(data=st.data(), skip_special_tokens=st.booleans())
def test_pieces_join_to_the_decoded_whole(kind, data, skip_special_tokens):
    tok = tokenizer(kind)
    chunks = data.draw(chunked(token_sequences(kind)))
    detokenizer = IncrementalDetokenizer(tok, skip_special_tokens)
    text = "".join(detokenizer.push(chunk) for chunk in chunks) + detokenizer.finish()
    assert text == tok.decode([i for chunk in chunks for i in chunk], skip_special_tokens)
    assert detokenizer.num_pending == 0


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_pending_tokens_are_exactly_those_with_text_to_come(kind, data):
    """The text out so far covers all settled tokens; with nothing pending it is all there is."""
    tok = tokenizer(kind)
    ids = data.draw(token_sequences(kind))
    detokenizer = IncrementalDetokenizer(tok)
    text = ""
    for count, token_id in enumerate(ids, 1):
        text += detokenizer.push([token_id])
        settled = count - detokenizer.num_pending
        assert 0 <= settled <= count
        if detokenizer.num_pending == 0:
            assert text == tok.decode(ids[:count])
        else:
            assert tok.decode(ids[:count]).startswith(text)
            assert len(text) >= len(tok.decode(ids[:settled]).rstrip("\ufffd"))
            if kind == "byte_level":  # elsewhere the bytes may be spaces that decoding strips
                assert text != tok.decode(ids[:count])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_output_continues_the_prompt(kind, data):
    """For a prompt of whole characters, prompt text and output text join to the decoded whole."""
    tok = tokenizer(kind)
    prompt = data.draw(token_sequences(kind))
    chunks = data.draw(chunked(token_sequences(kind)))
    output = [i for chunk in chunks for i in chunk]
    prompt_text = tok.decode(prompt)
    whole = tok.decode(prompt + output)
    assume(whole.startswith(prompt_text) and not prompt_text.endswith("\ufffd"))
    assume(kind == "byte_level" or not _meets_in_bytes(tok, prompt, output))
    detokenizer = IncrementalDetokenizer.after_prompt(tok, prompt)
    text = "".join(detokenizer.push(chunk) for chunk in chunks) + detokenizer.finish()
    assert text == whole[len(prompt_text) :]


def _meets_in_bytes(tok: Tokenizer, prompt: list[int], output: list[int]) -> bool:
    """Whether a run of byte tokens reaches across the border: its validity is then judged separately."""
    before = [p for i in prompt if i not in tok.special_ids and (p := tok.piece(i)) is not None]
    after = [p for i in output if i not in tok.special_ids and (p := tok.piece(i)) is not None]
    return bool(before and after and isinstance(before[-1], bytes) and isinstance(after[0], bytes))


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@pytest.mark.parametrize(
    ("prompt", "output", "expected"),
    [
        (b"ok\xe4", b"\xbd\xa0!", "你!"),  # the output finishes the prompt's character
        (b"ok\xe4\xbd", b"!", "!"),  # it does not: the U+FFFD is the prompt's
        (b"ok\xe4", b"", ""),
        (b"ok\xe4", b"\xe4\xbd\xa0", "你"),
        ("ok你".encode(), "好".encode(), "好"),  # a finished character stays with the prompt
        (b"\xf0\x9f\x99", b"\x82", "🙂"),
    ],
)
def test_characters_across_the_border_of_the_prompt(kind, prompt, output, expected):
    ids = byte_token_ids(kind)
    tok = tokenizer(kind)
    detokenizer = IncrementalDetokenizer.after_prompt(tok, [ids[byte] for byte in prompt])
    text = "".join(detokenizer.push([ids[byte]]) for byte in output) + detokenizer.finish()
    assert text == expected


def test_a_word_after_a_prompt_keeps_its_space_and_a_first_word_loses_it():
    tok = tokenizer("sentencepiece")
    word = tok.encode("Paris", add_special_tokens=False)
    bos = 1
    with_text = IncrementalDetokenizer.after_prompt(tok, tok.encode("The capital of France is"))
    assert with_text.push(word) == " Paris"
    for empty_prompt in ([], [bos]):
        without_text = IncrementalDetokenizer.after_prompt(tok, empty_prompt)
        assert without_text.push(word) == "Paris"
    showing_special_tokens = IncrementalDetokenizer.after_prompt(tok, [bos], skip_special_tokens=False)
    assert showing_special_tokens.push(word) == " Paris"


def test_half_a_character_is_never_given_out():
    tok, ids = tokenizer("byte_level"), byte_token_ids("byte_level")
    detokenizer = IncrementalDetokenizer(tok)
    assert [detokenizer.push([ids[byte]]) for byte in "你🙂".encode()] == ["", "", "你", "", "", "", "🙂"]
    assert detokenizer.push([ids[0xE4]]) == ""
    assert detokenizer.num_pending == 1
    assert detokenizer.finish() == "\ufffd"


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_a_long_stream_of_broken_bytes_keeps_the_state_small_and_the_text_exact(kind):
    tok, ids = tokenizer(kind), byte_token_ids(kind)
    stream = [ids[byte] for byte in b"\xe4\xbd\xff\xa0" * 5_000] + tok.encode(
        " done", add_special_tokens=False
    )
    detokenizer = IncrementalDetokenizer(tok)
    most_pending, text = 0, ""
    for token_id in stream:
        text += detokenizer.push([token_id])
        most_pending = max(most_pending, detokenizer.num_pending)
    assert text + detokenizer.finish() == tok.decode(stream)
    if kind == "byte_level":
        assert most_pending <= 3


def test_a_decoder_that_cannot_be_streamed_is_refused_by_name():
    for decoder, name in [
        (decoders.WordPiece(), "WordPiece"),
        (None, "none"),
        (decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()]), "Strip"),
        (decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 1)]), "Strip"),
        (decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 2, 0)]), "Strip"),
        (decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]), "Replace"),
    ]:
        backend = byte_level_tokenizer()
        backend.decoder = decoder
        bad = Tokenizer(backend, special_tokens={}, bos_token_id=None, eos_token_ids=(), chat_templates={})
        with pytest.raises(ConfigError, match=name):
            IncrementalDetokenizer(bad)


@pytest.mark.parametrize("kind", ["sentencepiece", "gguf_style", "gemma_style"])
@pytest.mark.parametrize("data", [b"\xc3", b"\xe2\x82", "🙂".encode(), "éé".encode()])
def test_the_text_of_a_run_of_bytes_is_told_apart_from_that_of_the_token_that_ends_it(
    kind: str, data: bytes
) -> None:
    tok = tokenizer(kind)
    detokenizer = IncrementalDetokenizer(tok)
    assert detokenizer.push(byte_token_ids(kind)[byte] for byte in data) == ""
    (a,) = (i for i in range(tok.vocab_size) if tok.piece(i) == "a")
    text = detokenizer.push_one(a)
    assert detokenizer.num_flushed == len(text) - 1 > 0
    assert text[detokenizer.num_flushed :] == "a"
    assert (detokenizer.push_one(a), detokenizer.num_flushed) == ("a", 0)
