"""Masks within bounded strings, put together from tables: those of the matcher, to the last token."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from engine.grammar.look_ahead import masks_behind
from engine.grammar.matcher import ConstraintMatcher
from engine.grammar.string_masks import RULE, StringPlace, begun_character
from engine.grammar.vocabulary import VocabularyData, allows
from helpers.grammars import Grammars, bundled_vocabulary

WALKS = 6
STEPS = 60
TRIED = 60
"""Tokens that are tried one by one at each place, beside those with a quote and those that end within a
character."""


def string(least: int, most: int) -> dict:
    return {"type": "string", "minLength": least, "maxLength": most}


NULL = {"type": "null"}
SCHEMAS = {
    "one": string(0, 12),
    "least": string(5, 9),
    "exact": string(3, 3),
    "few": string(0, 2),
    "far": string(0, 200),
    "far least": string(140, 200),
    "far least, no most": {
        "type": "array",
        "prefixItems": [{"type": "string", "minLength": 300}],
        "items": {"type": "string"},
    },
    "properties": {
        "type": "object",
        "properties": {"a": string(2, 7), "b": string(0, 4), "n": {"type": "integer"}},
        "required": ["a"],
    },
    "items": {"type": "array", "items": string(1, 5), "maxItems": 4},
    "either length": {"anyOf": [string(0, 5), string(3, 10)]},
    "either object": {
        "anyOf": [
            {"type": "object", "properties": {"a": string(0, 5), "b": NULL}, "required": ["a", "b"]},
            {"type": "object", "properties": {"a": string(2, 9), "c": NULL}, "required": ["a", "c"]},
        ]
    },
    "or one of": {"anyOf": [{"enum": ["", "abc", "a b"]}, string(2, 6)]},
    "or pattern": {"anyOf": [{"type": "string", "pattern": "a[a-z]{0,20}"}, string(1, 6)]},
    "any": {"type": "string"},
    "any items": {"type": "array", "items": {"type": "string"}},
    "any names": {
        "type": "object",
        "properties": {"ab": string(0, 3)},
        "required": ["ab"],
        "additionalProperties": {"type": "string"},
    },
    "anything": {"type": "object"},
    "or any": {"anyOf": [{"type": "string"}, string(1, 6)]},
    "names": {"type": "object", "propertyNames": string(1, 4), "additionalProperties": string(0, 3)},
    "recursive": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"v": string(0, 6), "next": {"anyOf": [{"$ref": "#/$defs/node"}, NULL]}},
                "required": ["v"],
            }
        },
    },
}  # fmt: skip
NEVER_ASKED = {"or any", "any", "any items", "anything", "far least, no most"}
"""The tables have nothing to say where something else may always come, too, nor where nothing is counted."""

LONG = {"any", "any items", "one", "least", "far", "far least", "properties", "recursive"}
"""Where most answers go on within a string, for several tokens."""


@pytest.fixture(scope="module")
def grammars():
    return Grammars(bundled_vocabulary())


def allowed_ids(mask: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def walk(grammars: Grammars, grammar, seed: int) -> int:
    """Follow an answer drawn by chance and compare the masks at every place; how many the tables gave."""
    tokens, draw = grammars.vocabulary.tokens, random.Random(seed)
    delicate = [i for i, t in enumerate(tokens) if b'"' in t or begun_character(t) or t[:1] >= b"\x80"]
    matcher = grammars.bindings.GrammarMatcher(grammar.handle, [grammars.end_id], False, -1, None)
    place = StringPlace(*grammar.strings)
    mask, expected = np.empty((2, -(-len(tokens) // 32)), np.int32)
    num_given = 0
    for _ in range(STEPS):
        matcher.fill_next_token_bitmask(expected, 0, False)
        given = place.mask(matcher, mask)
        if given is not None:
            num_given += 1
            assert allowed_ids(given) == allowed_ids(expected)
        ordinary = draw.sample(range(len(tokens)), min(TRIED, len(tokens)))
        for token_id in {*delicate, *ordinary} - {grammars.end_id}:
            takes = matcher.fork().accept_token(token_id, False)
            assert takes == bool(expected[token_id >> 5] >> (token_id & 31) & 1), tokens[token_id]
        choices = [i for i in allowed_ids(expected) if i != grammars.end_id]
        if not choices:
            break
        rare = [i for i in choices if i in delicate]
        token_id = draw.choice(rare if rare and draw.random() < 0.3 else choices)
        assert matcher.accept_token(token_id, False)
        place.saw(tokens[token_id])
    return num_given


@pytest.mark.parametrize("name", SCHEMAS)
def test_masks_are_those_of_the_matcher(grammars, name):
    grammar = grammars.compile("json_schema", SCHEMAS[name], counts=True)
    num_given = sum(walk(grammars, grammar, seed) for seed in range(WALKS))
    assert (num_given == 0) == (name in NEVER_ASKED)


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("name", SCHEMAS)
def test_an_answer_that_the_matcher_hears_of_late_is_matched_like_any_other(grammars, name, counts):
    """Also when tokens are guessed and forgotten again, and with characters of several bytes."""
    grammar = grammars.compile("json_schema", SCHEMAS[name], counts=counts)
    tokens, num_late = grammars.vocabulary.tokens, 0
    delicate = {i for i, t in enumerate(tokens) if b'"' in t or begun_character(t) or t[:1] >= b"\x80"}
    row, expected = np.empty((2, -(-len(tokens) // 32)), np.int32)
    for seed in range(WALKS):
        draw = random.Random(f"{name} {seed}")
        matcher = ConstraintMatcher(grammar, [grammars.end_id])
        told = grammars.bindings.GrammarMatcher(grammar.handle, [grammars.end_id], False, -1, None)
        for _ in range(STEPS):
            if matcher.is_over:
                break
            told.fill_next_token_bitmask(expected, 0, False)
            mask = matcher.mask(row).copy()
            allowed = allowed_ids(mask)
            assert set(allowed) <= set(allowed_ids(expected))
            if not matcher.forced and matcher._held is None:
                assert (mask == expected).all()
            before = matcher.state()
            guesses = [draw.choice(allowed), *draw.choices(range(len(tokens)), k=3)]
            for guess, behind in zip(guesses, masks_behind(matcher, mask, guesses), strict=False):
                assert allows(mask, np.array([guess]))
                mask = behind
            assert matcher.state() == before
            rare = delicate.intersection(allowed)
            token_id = draw.choice(sorted(rare) if rare and draw.random() < 0.2 else allowed)
            matcher.take(token_id)
            assert told.accept_token(token_id, False)
            num_late += bool(matcher._library.behind)
    assert num_late > 0 or name not in LONG


def ids_of(grammars: Grammars, text: bytes) -> list[int]:
    """A token for each byte."""
    return [grammars.vocabulary.tokens.index(bytes([byte])) for byte in text]


@pytest.mark.parametrize("escaped", [rb"\u00e9", rb"\ud83d\ude00", rb"\n", rb"\\", rb"\""])
def test_what_may_stand_in_an_escape_is_not_taken_for_the_rest_of_its_string(grammars, escaped):
    """Also beside a string that is counted: then every place is looked at."""
    schema = {
        "type": "array",
        "items": {"anyOf": [NULL, string(0, 300)]},
        "prefixItems": [{"type": "string"}],
    }
    grammar = grammars.compile("json_schema", schema, counts=True)
    matcher = ConstraintMatcher(grammar, [grammars.end_id])
    told = grammars.bindings.GrammarMatcher(grammar.handle, [grammars.end_id], False, -1, None)
    row, expected = np.empty((2, -(-len(grammars.vocabulary.tokens) // 32)), np.int32)
    begin, *rest = ids_of(grammars, b'["x' + escaped + b'yz","')
    for token_id in [begin, *rest]:
        while matcher.forced:
            matcher.take(matcher.forced[0])
        told.fill_next_token_bitmask(expected, 0, False)
        if matcher._held is None:
            assert (matcher.mask(row) == expected).all()
        matcher.take(token_id)
        assert told.accept_token(token_id, False)


def test_going_back_over_a_closing_quote_brings_back_what_the_matcher_had_not_heard_of(grammars):
    """As many tokens as in the next string, which is guessed."""
    schema = {"type": "array", "items": {"type": "string"}}
    grammar = grammars.compile("json_schema", schema)
    matcher = ConstraintMatcher(grammar, [grammars.end_id])
    told = grammars.bindings.GrammarMatcher(grammar.handle, [grammars.end_id], False, -1, None)
    row, expected = np.empty((2, -(-len(grammars.vocabulary.tokens) // 32)), np.int32)

    def take(text: bytes) -> None:
        for token_id in ids_of(grammars, text):
            if not matcher.forced:
                assert allows(matcher.mask(row), np.array([token_id]))
            matcher.take(token_id)

    take(b'["ab')
    before, behind = matcher.state(), list(matcher._library.behind)
    assert behind
    take(b'","xy')
    assert len(matcher._library.behind) == len(behind)
    matcher.go_back(before)
    assert matcher.state() == before
    take(b"c")
    assert told.accept_string(b'["abc', False)
    told.fill_next_token_bitmask(expected, 0, False)
    assert (matcher.mask(row) == expected).all()
    take(b'"')
    assert told.accept_string(b'"', False)


def test_a_vocabulary_without_single_bytes():
    """What may follow the closing quote is found without them."""
    tokens = [
        b"",
        b'"',
        b'{"a":"',
        b"ab",
        b'x"',
        b'"}',
        b'",',
        b'y","b":"',
        b'","b":"',
        b"}",
        b"\xc3",
        b"\xa9",
    ]
    grammars = Grammars(VocabularyData(tokens, np.array(range(1, 12), "<i4").tobytes(), None))
    properties = {"a": string(1, 5), "b": string(0, 3)}
    grammar = grammars.compile("json_schema", {"type": "object", "properties": properties}, counts=True)
    assert sum(walk(grammars, grammar, seed) for seed in range(20)) > 0


def test_tables_are_for_strings_of_schemas_only(grammars):
    """Rules of somebody else may have any name."""
    name = f"{RULE}0_5"
    ebnf = f'root ::= "\\"" {name}\n{name}[temperature=1] ::= [a-c]* "\\""'
    assert grammars.compile("ebnf", ebnf).strings is None
    tag = {"type": "structural_tag", "format": {"type": "grammar", "grammar": ebnf}}
    assert grammars.compile("structural_tag", tag).strings is None
    assert grammars.compile("structural_tag", json.dumps(tag).replace(name[:3], r"\u0073tr")).strings is None
    assert grammars.compile("json_schema", {"type": "integer"}).strings is None
    assert grammars.compile("json_schema", SCHEMAS["properties"]).strings is not None
    tag["format"] = {"type": "json_schema", "json_schema": SCHEMAS["properties"]}
    grammar = grammars.compile("structural_tag", tag, counts=True)
    assert sum(walk(grammars, grammar, seed) for seed in range(WALKS)) > 0


@pytest.mark.parametrize(
    ("text", "begun"),
    [
        (b"", b""), (b"a", b""), (b"\xc3", b"\xc3"), (b"\xc3\xa9", b""), (b"a\xe2\x82", b"\xe2\x82"),
        (b"\xe2\x82\xac", b""), (b"\xf0\x9f\x98", b"\xf0\x9f\x98"), (b"\xf0\x9f\x98\x80", b""),
        (b"\xf0\x9f\x98\x80\xf0", b"\xf0"),
    ],
)  # fmt: skip
def test_a_begun_character(text, begun):
    assert begun_character(text) == begun
