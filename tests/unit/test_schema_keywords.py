"""Every keyword of JSON schema is enforced or refused, and docs/structured-output.md says which."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import jsonschema_rs
import pytest
from jsonschema_specifications import REGISTRY

from engine.grammar.errors import GrammarError
from engine.grammar.schema_keywords import ANNOTATIONS, FORMATS, KEYWORDS
from helpers.grammars import Grammars, bundled_vocabulary

DOCS = Path(__file__).parents[2] / "docs" / "structured-output.md"

INTEGER, STRING = {"type": "integer"}, {"type": "string"}
PAIR = {"type": "object", "properties": {"a": INTEGER, "b": STRING}}

# keyword: schema, instances that are accepted, instances that are not
ENFORCED = [
    ("type", {"type": ["integer", "null"]}, [1, None], ["a", 1.5, True]),
    ("type", INTEGER, [0, -5, 10**30], ["1", 1.5]),
    ("type", {"type": "number"}, [0, -1.5, 1e25], ["1", None]),
    ("type", {"type": "boolean"}, [True, False], [0]),
    ("enum", {"enum": [1, "a", None, {"x": [1]}]}, [1, "a", None, {"x": [1]}], [2, "b", {}]),
    ("enum", {"enum": ["é\n\"q\\", "b"], "type": "string"}, ["b"], ["c"]),
    ("const", {"const": {"a": [1, None]}}, [{"a": [1, None]}], [{"a": [1]}, 1]),
    ("anyOf", {"anyOf": [INTEGER, STRING]}, [1, "a"], [True, None]),
    ("oneOf", {"oneOf": [INTEGER, STRING]}, [1, "a"], [True, None]),
    ("allOf", {"allOf": [{"type": "integer", "minimum": 3}]}, [3], [2, "a"]),
    ("$ref", {"$ref": "#/$defs/x", "$defs": {"x": INTEGER}}, [1], ["a"]),
    ("$ref", {"type": "object", "properties": {"a": INTEGER, "b": {"$ref": "#"}}},
     [{"b": {"b": {"a": 1}}}], [{"b": 1}]),
    ("$defs", {"$defs": {"x": STRING}, "type": "array", "items": {"$ref": "#/$defs/x"}}, [["a"]], [[1]]),
    ("definitions", {"definitions": {"x": STRING}, "$ref": "#/definitions/x"}, ["a"], [1]),
    ("minimum", {"type": "integer", "minimum": 2.0}, [2, 3], [1]),
    ("maxItems", {"type": "array", "prefixItems": [INTEGER, STRING], "maxItems": 2},
     [[1, "a"]], [[1, "a", 2]]),
    ("minimum", {"type": "integer", "minimum": -5}, [-5, 7, 1000], [-6]),
    ("minimum", {"type": "number", "minimum": 1.5}, [1.5, 2, 100], [1.25, -3]),
    ("maximum", {"type": "integer", "maximum": 17}, [17, -100], [18, 100]),
    ("maximum", {"type": "number", "maximum": 3}, [2.75, -1], [3.5, 10]),
    ("exclusiveMinimum", {"type": "number", "exclusiveMinimum": 1}, [1.5, 2], [1, 0.5]),
    ("exclusiveMinimum", {"type": "integer", "exclusiveMinimum": 1}, [2], [1, 0]),
    ("exclusiveMaximum", {"type": "number", "exclusiveMaximum": 3}, [2.5, -1], [3, 4]),
    ("multipleOf", {"type": "integer", "multipleOf": 7}, [0, 7, -14, 70], [1, 8]),
    ("minLength", {"type": "string", "minLength": 2}, ["ab", "日本", "abc"], ["a", ""]),
    ("maxLength", {"type": "string", "maxLength": 3}, ["", "abc", "日本語"], ["abcd", "\x01"]),
    ("maxLength", {"type": "string", "maxLength": 30_000}, ["a" * 30_000], ["a" * 30_001]),
    ("minLength", {"type": "string", "minLength": 3, "maxLength": 9000},
     ["abc", "a" * 9000], ["ab", "a" * 9001]),
    ("pattern", {"type": "string", "pattern": "^[a-c]{2}$"}, ["ab"], ["a", "abc", "xy"]),
    ("pattern", {"type": "string", "pattern": "^(red|blue)( [0-9]{1,2})?$"},
     ["red 3", "blue"], ["red3", "red "]),
    ("pattern", {"type": "string", "pattern": "^.{0,200}$"}, ["", "é!" * 100], ["a" * 201, '"', "\\"]),
    ("pattern", {"type": "string", "pattern": "^[ -~]|日[本語]$"}, ["!", "日語"], ['"', "\\", "日"]),
    ("pattern", {"type": "string", "pattern": r"^[^x]\W.$"}, ["a!b"], ["x!b", 'a!"', "a!\\", "a!\n"]),
    ("format", {"type": "string", "format": "date"}, ["2024-02-29"], ["2024-13-01", "2023-02-29", "x"]),
    ("items", {"type": "array", "items": INTEGER}, [[], [1, 2]], [["a"], [1, "a"]]),
    ("items", {"type": "array"}, [[], [1, "a", None, {"a": []}]], [1]),
    ("items", {"type": "array", "prefixItems": [INTEGER], "items": STRING}, [[1, "a"]], [[1, 2], ["a"]]),
    ("prefixItems", {"type": "array", "prefixItems": [INTEGER, STRING]}, [[1, "a"]], [["a", 1]]),
    ("unevaluatedItems", {"type": "array", "prefixItems": [INTEGER], "unevaluatedItems": STRING},
     [[1, "a"]], [[1, 2]]),
    ("minItems", {"type": "array", "items": INTEGER, "minItems": 2}, [[1, 2]], [[], [1]]),
    ("minItems", {"type": "array", "minItems": 1}, [[1]], [[]]),
    ("maxItems", {"type": "array", "items": INTEGER, "maxItems": 2}, [[], [1, 2]], [[1, 2, 3]]),
    ("uniqueItems", {"type": "array", "items": INTEGER, "uniqueItems": False}, [[1, 1]], []),
    ("properties", PAIR, [{}, {"a": 1}, {"a": 1, "b": "x"}], [{"a": "x"}, {"c": 1}]),
    ("properties", {"properties": {"a": INTEGER}}, [{"a": 1}], [{"a": "x"}, 1]),
    ("required", {**PAIR, "required": ["b"]}, [{"b": "x"}, {"a": 1, "b": "x"}], [{}, {"a": 1}]),
    ("additionalProperties", {"type": "object", "additionalProperties": INTEGER}, [{"x": 1}], [{"x": "y"}]),
    ("additionalProperties", {**PAIR, "additionalProperties": INTEGER}, [{"a": 1, "x": 1}], [{"x": "y"}]),
    ("unevaluatedProperties", {**PAIR, "unevaluatedProperties": INTEGER}, [{"a": 1, "x": 1}], [{"x": "y"}]),
    ("patternProperties", {"type": "object", "patternProperties": {"^x[0-9]$": INTEGER}},
     [{"x1": 1}], [{"y": 1}, {"x1": "a"}]),
    ("propertyNames", {"type": "object", "additionalProperties": INTEGER, "propertyNames": {"maxLength": 2}},
     [{"ab": 1}], [{"abc": 1}, {"\x01": 1}]),
    ("propertyNames", {"type": "object", "additionalProperties": INTEGER,
                       "propertyNames": {"pattern": "^[a-z]$"}}, [{"a": 1}], [{"B": 1}]),
    ("minProperties", {**PAIR, "minProperties": 1}, [{"a": 1}, {"b": "x"}], [{}]),
    ("minProperties", {"type": "object", "minProperties": 1}, [{"a": 1}], [{}]),
    ("maxProperties", {**PAIR, "maxProperties": 1}, [{}, {"b": "x"}], [{"a": 1, "b": "x"}]),
]  # fmt: skip

# keyword: schema that is refused because of it
REFUSED = [
    ("not", {"not": INTEGER}),
    ("if", {"if": INTEGER}),
    ("then", {"then": INTEGER}),
    ("else", {"else": INTEGER}),
    ("dependentRequired", {**PAIR, "dependentRequired": {"a": ["b"]}}),
    ("dependentSchemas", {**PAIR, "dependentSchemas": {"a": {"required": ["b"]}}}),
    ("contains", {"type": "array", "contains": INTEGER}),
    ("minContains", {"type": "array", "minContains": 1}),
    ("maxContains", {"type": "array", "maxContains": 1}),
    ("uniqueItems", {"type": "array", "items": INTEGER, "uniqueItems": True}),
    ("contentEncoding", {"type": "string", "contentEncoding": "base64"}),
    ("contentMediaType", {"type": "string", "contentMediaType": "application/json"}),
    ("contentSchema", {"type": "string", "contentSchema": {}}),
    ("$anchor", {"$anchor": "a"}),
    ("$dynamicAnchor", {"$dynamicAnchor": "a"}),
    ("$dynamicRef", {"$dynamicRef": "#a"}),
    ("$vocabulary", {"$vocabulary": {}}),
    ("$id", {"properties": {"a": {"$id": "http://example.com/a"}}}),
    ("allOf", {"allOf": [INTEGER, {"minimum": 3}]}),
    ("minimum", {"$ref": "#/$defs/x", "minimum": 3, "$defs": {"x": INTEGER}}),
    ("$ref", {"$ref": "http://example.com/x"}),
    ("$ref", {"$ref": "#/$defs/none"}),
    ("$ref", {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
    ("type", {"anyOf": [INTEGER, STRING], "type": "integer"}),
    ("type", {"type": "whole"}),
    ("type", {"type": []}),
    ("enum", {"enum": [1, "a"], "type": "string"}),
    ("enum", {"enum": []}),
    ("const", {"const": 5, "type": "string"}),
    ("multipleOf", {"type": "number", "multipleOf": 0.5}),
    ("multipleOf", {"type": "integer", "multipleOf": 5, "minimum": 0}),
    *(
        (keyword, {"type": ["null", "integer"], keyword: 2.5})
        for keyword in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
    ),
    ("maxItems", {"type": "array", "prefixItems": [INTEGER, STRING], "maxItems": 1}),
    ("maxLength", {"type": "string", "pattern": "^a$", "maxLength": 3}),
    ("minLength", {"type": "string", "format": "date", "minLength": 3}),
    ("format", {"type": "string", "format": "regex"}),
    ("format", {"type": "string", "format": ["date"]}),
    ("format", {"type": "string", "pattern": "^a$", "format": "date"}),
    ("minimum", {"minimum": 3}),
    ("maxLength", {"maxLength": 3}),
    ("minItems", {"minItems": 3}),
    ("required", {"required": ["a"]}),
    ("required", {**PAIR, "required": ["c"]}),
    ("patternProperties", {**PAIR, "patternProperties": {"^a": STRING}}),
    ("propertyNames", {**PAIR, "propertyNames": {"maxLength": 3}}),
    ("minProperties", {"type": "object", "additionalProperties": True, "minProperties": 2}),
    ("nullable", {"type": "string", "nullable": True}),
    ("dependencies", {"dependencies": {}}),
    ("additionalItems", {"additionalItems": False}),
    ("$recursiveRef", {"$recursiveRef": "#"}),
    ("$ref", {"$ref": "#/$defs/x", "$defs": {"x": False}}),
    ("$ref", {"items": {"$ref": "#/x-a"}, "x-a": {"type": "integer", "not": INTEGER}}),
    ("$ref", {"items": {"$ref": "#/x-a"}, "x-a": {"type": "string", "pattern": "^a$"}}),
    ("$ref", {"properties": {"a": {"const": {"not": INTEGER}}, "b": {"$ref": "#/properties/a/const"}}}),
    ("$ref", {"$ref": "#/$defs", "$defs": {"title": {}}}),
    ("$ref", {"$ref": "#/title", "title": "a"}),
    ("oneOf", {"oneOf": [INTEGER, {"type": "number"}]}),
]

VOCABULARIES_2020_12 = (
    "core", "applicator", "unevaluated", "validation", "meta-data", "format-annotation", "content"
)  # fmt: skip


@pytest.fixture(scope="module")
def grammars():
    return Grammars(bundled_vocabulary())


def spelled(instance) -> str:
    return json.dumps(instance, separators=(",", ":"), ensure_ascii=False)


@pytest.mark.parametrize(("keyword", "schema", "good", "bad"), ENFORCED)
def test_what_is_enforced(grammars, keyword, schema, good, bad):
    grammar = grammars.compile("json_schema", schema)
    for instance in good:
        jsonschema.validate(instance, schema)
        assert grammars.accepts(grammar, spelled(instance)), instance
    for instance in bad:
        text = json.dumps(instance, separators=(",", ":"), ensure_ascii=False)
        raw = text.replace("\\u0001", "\x01")
        assert not grammars.accepts(grammar, raw), instance


@pytest.mark.parametrize(("keyword", "schema"), REFUSED)
def test_what_is_refused(grammars, keyword, schema):
    with pytest.raises(GrammarError, match=re.escape(f'has "{keyword}" at #')):
        grammars.compile("json_schema", schema)


@pytest.mark.parametrize(
    ("schema", "at"),
    [
        (False, "#,"),
        ({"properties": {"a": False}}, "#/properties/a,"),
        ({"anyOf": [INTEGER, False]}, "#/anyOf/1,"),
        ({"type": "array", "prefixItems": [False]}, "#/prefixItems/0,"),
    ],
)
def test_the_schema_that_nothing_matches(grammars, schema, at):
    with pytest.raises(GrammarError, match=f"the schema false at {at}"):
        grammars.compile("json_schema", schema)


@pytest.mark.parametrize("wrong", range(7))
def test_schemas_that_overlap_are_named_by_their_place(grammars, wrong):
    """The first of many, at any depth."""
    schema = {"oneOf": [INTEGER, STRING]}
    for depth in range(6, -1, -1):
        branches = [INTEGER, {"type": "number"} if depth >= wrong else STRING]
        schema = {"properties": {"a": {"oneOf": branches}, "b": schema}}
    at = "#" + "/properties/b" * wrong + "/properties/a"
    with pytest.raises(GrammarError, match=f'"oneOf" at {at}, which'):
        grammars.compile("json_schema", schema)


LINK = {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}}
TREE = {"type": "object", "properties": {"next": {"type": "array", "items": {"$ref": "#/$defs/n"}}}}


@pytest.mark.parametrize(
    ("keyword", "schema", "what"),
    [
        ("minimum", {"type": "number", "minimum": "x"}, "number"),
        ("minimum", {"type": "integer", "minimum": True}, "number"),
        ("maximum", {"type": "integer", "maximum": 10**30}, "64 bits"),
        ("minimum", {"type": "integer", "minimum": 5, "maximum": 1}, "below 'maximum'"),
        ("exclusiveMinimum", {"type": "number", "exclusiveMinimum": 1, "exclusiveMaximum": 1}, "below"),
        ("multipleOf", {"type": "integer", "multipleOf": 0}, "above 0"),
        ("exclusiveMinimum", {"type": "number", "exclusiveMinimum": 0, "maximum": 1e-7}, "so near"),
        ("minimum", {"type": "number", "minimum": 0.1000001, "maximum": 0.1000009}, "so near"),
        ("minLength", {"type": "string", "minLength": 5, "maxLength": 1}, "at most 'maxLength'"),
        ("minLength", {"type": "string", "minLength": -1}, "whole number"),
        ("maxItems", {"type": "array", "maxItems": "1"}, "whole number"),
        ("minItems", {"type": "array", "minItems": 3, "maxItems": 2}, "at most 'maxItems'"),
        ("maxProperties", {"type": "object", "maxProperties": 2**31}, "whole number"),
        ("$ref", {"$ref": "#/$defs/n", "$defs": {"n": {**LINK, "required": ["next"]}}}, "without an end"),
        ("$ref", {"$ref": "#/$defs/n", "$defs": {"n": {"anyOf": [{**LINK, "required": ["next"]}]}}}, "end"),
        ("$ref", {"$ref": "#/$defs/n", "$defs": {"n": {
            **TREE, "required": ["next"],
            "properties": {"next": {"type": "array", "items": {"$ref": "#/$defs/n"}, "minItems": 1}}}}},
         "end"),
        ("$ref", {"type": "array", "prefixItems": [{"$ref": "#"}], "minItems": 1}, "without an end"),
    ],
)  # fmt: skip
def test_what_nothing_can_follow(grammars, keyword, schema, what):
    """Refused at any depth, with the place."""
    for outer, at in ((schema, "#"), ({"anyOf": [schema, True]}, "#/anyOf/0")):
        if "$ref" not in json.dumps(schema) or at == "#":
            with pytest.raises(GrammarError, match=f'has "{re.escape(keyword)}" at {at}.*{what}'):
                grammars.compile("json_schema", outer)


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/$defs/n", "$defs": {"n": LINK}},
        {"$ref": "#/$defs/n", "$defs": {"n": {**TREE, "required": ["next"]}}},
        {"$ref": "#/$defs/n", "$defs": {"n": {"anyOf": [{**LINK, "required": ["next"]}, {"type": "null"}]}}},
        {"$ref": "#/$defs/n", "$defs": {"n": {**LINK, "required": ["next"], "type": ["object", "integer"]}}},
        {"type": "integer", "minimum": 5, "maximum": 5},
        {"type": "number", "minimum": 0.1, "maximum": 0.1},
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1e-6},
        {"type": "string", "minimum": 9, "maximum": 1},
    ],
)
def test_what_comes_to_an_end(grammars, schema):
    grammar = grammars.compile("json_schema", schema)
    answers = [grammars.random_answer(grammar, seed) for seed in range(20)]
    found = [json.loads(answer) for answer in answers if answer is not None]
    assert found
    for value in found:
        jsonschema.validate(value, schema)


def test_a_bound_beyond_all_numbers(grammars):
    with pytest.raises(GrammarError, match='has "minimum" at #, which must be a number'):
        grammars.compile("json_schema", '{"type": "number", "minimum": 1e999}')


def test_a_declared_name_is_not_spelled_in_another_way(grammars):
    """Its value would not be held to its schema."""
    names = ("a", "ab", "é", "x/y", 'quo"te')
    properties = dict.fromkeys(names, INTEGER)
    for keyword in ("additionalProperties", "unevaluatedProperties"):
        for required in ([], ["ab"]):
            schema = {"type": "object", "properties": properties, "required": required, keyword: STRING}
            grammar = grammars.compile("json_schema", schema)
            before = '"ab":1,' if required else ""
            for name in ("b", "aa", "abc", "ac", "x", "quo", "z\\n\\u0061"):
                assert grammars.accepts(grammar, f'{{{before}"{name}":"s"}}'), name
            for name in (
                r"\u0061",
                r"a\u0062",
                r"\u00e9",
                r"x\/y",
                r"quo\u0022te",
                r"quo\"te",
                r"\u0071uo\"te",
            ):
                assert json.loads(f'"{name}"') in names
                assert not grammars.accepts(grammar, f'{{{before}"{name}":"s"}}'), name


ANYTHING = {"a": {}, "b": [], "c": [1, {"d": 2, "e": [[], "x"]}]}


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_object", ""),
        ("json_schema", True),
        ("json_schema", {"type": "object"}),
        ("json_schema", {"type": "object", "properties": {"a": {"type": "object"}, "b": {"type": "array"},
                                                          "c": {"type": "array", "items": True}}}),
        ("json_schema", {"type": "object", "additionalProperties": {"type": ["object", "array"]}}),
    ],
)  # fmt: skip
def test_json_is_compact_wherever_nothing_is_said_about_it(grammars, kind, text):
    grammar = grammars.compile(kind, text)
    assert grammars.accepts(grammar, spelled(ANYTHING))
    for separators in ((", ", ":"), (",", ": "), (" ,", ":"), (",", " :")):
        assert not grammars.accepts(grammar, json.dumps(ANYTHING, separators=separators))


NOT_UTF8 = (b"\xed\xa0\x80", b"\xc0\x80", b"\xe0\x80\x80", b"\xf0\x80\x80\x80", b"\xf4\x90\x80\x80", b"\xff")


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_schema", {"type": "string"}),
        ("json_schema", {"type": "string", "maxLength": 9}),
        ("json_schema", {"type": "string", "maxLength": 9000}),
        ("json_schema", {"type": "string", "minLength": 1}),
        ("json_schema", {"type": "string", "pattern": ".*"}),
        ("json_schema", {"type": "string", "pattern": "[^x]{0,9}"}),
        ("regex", '".*"'),
        ("regex", r'"[^x]{0,9}"'),
        ("regex", r'"[\s\S]{0,200}"'),
    ],
)
def test_strings_are_text(grammars, kind, text):
    grammar = grammars.compile(kind, text)
    for piece in NOT_UTF8:
        assert not grammars.accepts(grammar, b'"' + piece + b'"')
    assert grammars.accepts(grammar, '"é日😀\U0010ffff\ue000\ud7ff~"')


@pytest.mark.parametrize("keyword", sorted({*ANNOTATIONS, "$id", "x-anything"}))
def test_annotations_change_nothing(grammars, keyword):
    grammar = grammars.compile("json_schema", {"type": "integer", keyword: "x"})
    assert grammars.accepts(grammar, "12") and not grammars.accepts(grammar, '"a"')


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_formats_are_json_and_are_what_they_say(grammars, name):
    """By another validator, which knows them all."""
    schema = {"type": "string", "format": name}
    checker = jsonschema_rs.Draft202012Validator(schema, validate_formats=True)
    assert not checker.is_valid("\x01 {"), "it checks nothing"
    grammar = grammars.compile("json_schema", schema)
    answers = [grammars.random_answer(grammar, seed) for seed in range(200)]
    found = [json.loads(answer) for answer in answers if answer is not None]
    assert found
    assert [value for value in found if not checker.is_valid(value)] == []


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        ('^"$', "escape"),
        (r"^\\$", "escape"),
        (r"^\n$", "escape.* at #/properties/a$"),
        (r'^["\\]$', "escape"),
        ("^a{65537}$", "position 2 at #/properties/a/pattern"),
        ("^(?=a)b$", r"\(\?= at position 1 at #/properties/a/pattern"),
        ("b(?<!a)", r"\(\?<! at position 1 at #/properties/a/pattern"),
        ("(?i)a", r"\(\?i at position 0 at #/properties/a/pattern"),
        (r"a\b", r"\\b at position 1 at #/properties/a/pattern"),
        ("a|*", r"nothing: \* at position 2 at #/properties/a/pattern"),
        ("a^b", "enforced.* position 1.* at #/properties/a$"),
        ("a$b", "enforced.* position 1.* at #/properties/a$"),
        (r"\Aa", "enforced.* position 0.* at #/properties/a$"),
        ("(", "compiled.* position 1.* at #/properties/a$"),
        (r"^\p{L}$", r"\\p at position 1 at #/properties/a/pattern"),
    ],
)
def test_patterns_that_would_be_wrong(grammars, pattern, what):
    with pytest.raises(GrammarError, match=what):
        grammars.compile("json_schema", {"properties": {"a": {"type": "string", "pattern": pattern}}})


def test_the_table_in_the_documentation_is_whole():
    """Every keyword of the standard's vocabularies has a line there, which says what the tests say."""
    lines = dict(
        re.findall(r"^\| `([^`]+)` \| (enforced|refused|annotation) \|", DOCS.read_text(), flags=re.MULTILINE)
    )
    store = jsonschema.Draft202012Validator.META_SCHEMA
    assert store["$id"].endswith("2020-12/schema")
    standard = set()
    for name in VOCABULARIES_2020_12:
        contents = REGISTRY.contents(f"https://json-schema.org/draft/2020-12/meta/{name}")
        standard |= contents["properties"].keys()
    assert standard <= lines.keys()
    enforced = {keyword for keyword, *_ in ENFORCED}
    refused = {keyword for keyword, _ in REFUSED}
    for keyword, status in lines.items():
        match status:
            case "enforced":
                assert keyword in enforced and keyword in KEYWORDS, keyword
            case "refused":
                assert keyword in refused and keyword not in KEYWORDS, keyword
            case "annotation":
                assert keyword in ANNOTATIONS or keyword == "$id", keyword
    assert lines.keys() >= KEYWORDS | ANNOTATIONS
