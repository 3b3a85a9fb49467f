"""Structural tags: what is inside of them is held to what it would be alone, and nothing is passed over."""

from __future__ import annotations

import pytest

from engine.grammar.errors import GrammarError
from helpers.grammars import Grammars, bundled_vocabulary

COLOR = {
    "type": "object",
    "properties": {
        "color": {"type": "string", "pattern": "^(red|blue)( [0-9]{1,2})?$"},
        "name": {"type": "string", "maxLength": 5},
        "sizes": {"type": "array", "items": {"type": "integer"}},
    },
    "required": ["color"],
}
SCHEMA = {"type": "json_schema", "json_schema": COLOR}
WORD = {"type": "const_string", "value": "ab"}
TAG = {"type": "tag", "begin": "<f>", "content": SCHEMA, "end": "</f>"}


@pytest.fixture(scope="module")
def grammars():
    return Grammars(bundled_vocabulary())


@pytest.fixture(scope="module")
def free_grammars():
    return Grammars(bundled_vocabulary(), free_whitespace=True)


def compiled(grammars, form, **fields):
    return grammars.compile("structural_tag", {"type": "structural_tag", "format": form} | fields)


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        (SCHEMA, ['{"color":"red 3","name":"x","sizes":[1,2]}'],
         ['{"color":"red3"}', '{"color": "red"}', '{"color":"red","name":"\x01"}',
          '{"color":"red","name":"123456"}']),
        ({**SCHEMA, "is_spaced": True}, ['{"color": "red 3", "name": "x", "sizes": [1, 2]}'],
         ['{"color":"red"}', '{"color":  "red"}', '{ "color": "red"}']),
        ({"type": "json_schema", "json_schema": {"$defs": {"x": {"type": "integer"}}, "$ref": "#/$defs/x"}},
         ["3"], ["x"]),
        ({"type": "regex", "pattern": "a.b"}, ["axb"], ["a\nb", "ab"]),
        ({"type": "grammar", "grammar": "root ::= [0-9]+"}, ["12"], ["", "x"]),
        (WORD, ["ab"], ["a", "abab"]),
        ({"type": "any_text", "excludes": ["foo"]}, ["bar"], ["xfoo"]),
        ({"type": "repeat", "min": 1, "max": 2, "content": WORD}, ["ab", "abab"], ["", "ababab"]),
        ({"type": "plus", "content": WORD}, ["ab", "abab"], [""]),
        ({"type": "star", "content": WORD}, ["", "abab"], ["a"]),
        ({"type": "optional", "content": WORD}, ["", "ab"], ["abab"]),
        ({"type": "or", "elements": [WORD, {"type": "regex", "pattern": "x{2}"}]},
         ["ab", "xx"], ["x", "abxx"]),
        ({"type": "sequence", "elements": [WORD, SCHEMA]},
         ['ab{"color":"blue"}'], ['{"color":"blue"}', "ab"]),
        ({"type": "triggered_tags", "triggers": ["<f"], "tags": [TAG], "excludes": ["zz"]},
         ["hi", 'hi <f>{"color":"red"}</f> yo'], ["hi <f>x</f>", 'hi <f>{"color":"red3"}</f>', "zz"]),
        ({"type": "or", "elements": [WORD, TAG], "apart": ["<f>", "abc"]},
         ["ab", '<f>{"color":"red"}</f>'], ["abc", "<f>"]),
        ({"type": "tags_with_separator", "separator": ",", "tags": [TAG], "at_least_one": True},
         ['<f>{"color":"red"}</f>,<f>{"color":"red 12"}</f>'], ["", '<f>{"color":"red 123"}</f>']),
    ],
)  # fmt: skip
def test_what_is_enforced(grammars, form, good, bad):
    grammar = compiled(grammars, form)
    assert [text for text in good if not grammars.accepts(grammar, text)] == []
    assert [text for text in bad if grammars.accepts(grammar, text)] == []


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"type": "json_schema", "json_schema": {"not": {}}}, '"not" at #, .*in the schema at #/format'),
        ({"type": "sequence", "elements": [WORD, {"type": "json_schema", "json_schema": {
            "type": "object", "properties": {"q": {"contains": {}}}}}]},
         '"contains" at #/properties/q, .*in the schema at #/format/elements/1'),
        ({"type": "tag", "begin": "a", "end": "b", "content": {"type": "json_schema", "json_schema": {
            "type": "array", "items": {"type": "integer"}, "uniqueItems": True}}},
         '"uniqueItems" .*in the schema at #/format/content'),
        ({**SCHEMA, "style": "qwen_xml"}, '"style" at #/format'),
        ({**SCHEMA, "any_order": True}, '"any_order" at #/format'),
        ({"type": "json_schema"}, "must have a schema"),
        ({"type": "any_text", "max_tokens": 3}, '"max_tokens" at #/format'),
        ({"type": "token", "token": 3}, "not supported: 'token'"),
        ({"type": "tag", "begin": {"type": "token", "token": 3}, "content": WORD, "end": ""},
         '"begin" at #/format'),
        ({"type": "nothing"}, "not supported: 'nothing'"),
        ({"type": ["or"]}, "not supported"),
        ({"type": "sequence", "elements": {"a": 1}}, '"elements" at #/format, which must be an array'),
        ({"type": "optional"}, "must have a format at #/format/content"),
        ({"type": "repeat", "min": 1, "max": 10**6, "content": WORD}, '"max" at #/format'),
        ({"type": "regex", "pattern": "a{70000}"}, r"repeats more than 65536 times: \{70000\} at position 1"),
        ({"type": "regex", "pattern": 3}, '"pattern" at #/format'),
        ({"type": "const_string"}, "value"),
        (None, "must have a format at #/format"),
    ],
)  # fmt: skip
def test_what_is_refused(grammars, form, message):
    with pytest.raises(GrammarError, match=message):
        compiled(grammars, form)


def test_a_tag_holds_nothing_beside_its_format(grammars):
    with pytest.raises(GrammarError, match='"triggers"'):
        compiled(grammars, WORD, triggers=["a"])


def test_free_whitespace_is_free_everywhere(free_grammars):
    for kind, text in (
        ("json_schema", COLOR),
        ("json_object", ""),
        ("structural_tag", {"type": "structural_tag", "format": SCHEMA}),
        ("structural_tag", {"type": "structural_tag", "format": {**SCHEMA, "is_spaced": True}}),
    ):
        grammar = free_grammars.compile(kind, text)
        for answer in ('{"color":"red"}', '{"color": "red"}', '{\n  "color" :\t"red"\n}'):
            assert free_grammars.accepts(grammar, answer), (kind, answer)
        assert not free_grammars.accepts(grammar, '{"color":' + " " * 21 + '"red"}')


def test_definitions_are_put_where_they_are_named(grammars):
    twice = {"type": "sequence", "elements": [{"type": "definition", "name": "b"}] * 2}
    b = {"type": "sequence", "elements": [{"type": "definition", "name": "a"}, SCHEMA]}
    grammar = compiled(grammars, twice, definitions={"a": WORD, "b": b})
    assert grammars.accepts(grammar, 'ab{"color":"red"}ab{"color":"blue 1"}')
    assert not grammars.accepts(grammar, 'ab{"color":"red"}ab{"color":"blue1"}')


@pytest.mark.parametrize(
    ("form", "definitions", "message"),
    [
        ({"type": "definition", "name": "a"}, {}, "a definition at #/format that is not there: 'a'"),
        ({"type": "definition", "name": 1}, {"1": WORD}, "that is not there: 1"),
        ({"type": "definition", "name": "a", "end": "x"}, {"a": WORD}, '"end" at #/format'),
        (WORD, {"a": {"type": "definition", "name": "a"}}, "at #/definitions/a that is not there"),
        (
            WORD,
            {"a": {"type": "json_schema", "json_schema": {"not": {}}}},
            '"not" at #, .* at #/definitions/a',
        ),
        (WORD, [], '"definitions", which must be an object'),
        ({"type": "or", "elements": [WORD], "apart": "x"}, {}, '"apart" at #/format, which must be an array'),
        ({"type": "or", "elements": [WORD], "apart": [1]}, {}, '"apart" at #/format, which must be an array'),
        ({"type": "or", "elements": [], "apart": ["x"]}, {}, '"apart" at #/format, and no elements'),
        (
            {"type": "or", "elements": [SCHEMA, WORD], "apart": ["x", '{"c']},
            {},
            "cannot be told from an answer that begins with '{\"c', at #/format/elements/0",
        ),
    ],
)
def test_what_is_wrong_with_definitions_and_what_is_apart(grammars, form, definitions, message):
    with pytest.raises(GrammarError, match=message):
        compiled(grammars, form, definitions=definitions)
