"""Constrained answers of the bundled model: they match, they end by themselves, and forced text is free."""

from __future__ import annotations

import json
import re

import jsonschema
import jsonschema_rs
import pytest

from engine import LLM, SamplingParams
from engine.errors import InvalidRequest
from engine.sampling.constraint import Constraint
from helpers.random_schemas import random_schema
from helpers.regexes import REGEXES

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}

NUMBERS = {"type": "array", "items": {"type": "integer", "maximum": 9}, "minItems": 2, "maxItems": 2}


@pytest.fixture(scope="module")
def llm():
    with LLM(debug_checks=True) as llm:
        yield llm


def answer(llm, kind, text="", **params):
    constraint = Constraint(kind, text)
    params = SamplingParams(**{"max_tokens": 100, "seed": 1} | params, constraint=constraint)
    return llm.generate(["Answer: "], params, use_tqdm=False)[0].outputs[0]


def test_each_kind_of_constraint(llm):
    output = answer(llm, "json_schema", json.dumps(PERSON))
    jsonschema.validate(json.loads(output.text), PERSON)
    assert output.finish_reason == "stop"
    assert re.fullmatch(r"\d{3}-\d{3}-\d{4}", answer(llm, "regex", r"\d{3}-\d{3}-\d{4}").text)
    assert answer(llm, "choice", '["yes", "no", "per\\"haps"]').text in ("yes", "no", 'per"haps')
    assert re.fullmatch("(ab){2,3}c", answer(llm, "ebnf", 'root ::= ("ab"){2,3} "c"').text)
    assert answer(llm, "json_object").text.startswith("{")


def test_whitespace_between_elements_is_for_those_who_ask(llm):
    """A model that would write nothing but spaces."""
    (space,) = llm.tokenizer.encode(" ", add_special_tokens=False)
    params = {"logit_bias": {space: 100}, "max_tokens": 200, "temperature": 0}
    assert " " not in answer(llm, "json_schema", json.dumps(NUMBERS), **params).text
    with LLM(free_json_whitespace=True) as free:
        text = answer(free, "json_schema", json.dumps(NUMBERS), **params).text
    assert "[ " in text and " " * 21 not in text
    jsonschema.validate(json.loads(text), NUMBERS)


# --- whatever is drawn, the answer is right


@pytest.fixture(scope="module")
def random_llm():
    """As large as the bundled model, with weights drawn by chance."""
    with LLM(load_format="dummy", debug_checks=True) as llm:
        yield llm


def constrained(llm, kind, texts, max_tokens, **params):
    """One answer for each constraint, at temperature 1."""
    params = [
        SamplingParams(max_tokens=max_tokens, seed=seed, constraint=Constraint(kind, text), **params)
        for seed, text in enumerate(texts)
    ]
    outputs = llm.generate(["Answer: "] * len(params), params, use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def check(text, schema):
    """It validates, twice: jsonschema leaves formats aside, the other validator does not."""
    value = json.loads(text)
    jsonschema.validate(value, schema)
    jsonschema_rs.Draft202012Validator(schema, validate_formats=True).validate(value)


@pytest.mark.parametrize("model", ["llm", "random_llm"])
def test_random_schemas(request, model):
    schemas = [random_schema(seed) for seed in range(200)]
    outputs = constrained(request.getfixturevalue(model), "json_schema", map(json.dumps, schemas), 600)
    finished = 0
    for schema, output in zip(schemas, outputs, strict=True):
        if output.finish_reason == "stop":
            finished += 1
            check(output.text, schema)
    assert finished >= 190


@pytest.mark.parametrize("model", ["llm", "random_llm"])
def test_regular_expressions(request, model):
    outputs = constrained(request.getfixturevalue(model), "regex", REGEXES, 400)
    finished = 0
    for regex, output in zip(REGEXES, outputs, strict=True):
        if output.finish_reason == "stop":
            finished += 1
            flags = re.UNICODE if r"\s" in regex else re.ASCII  # a space is any space, digits are ASCII
            assert re.fullmatch(regex, output.text, flags), (regex, output.text)
    assert finished >= 45


@pytest.mark.parametrize("fields", [{}, {"ignore_eos": True}, {"min_tokens": 3}, {"logprobs": 1}])
@pytest.mark.parametrize(("kind", "text"), [("regex", "()"), ("choice", '[""]'), ("ebnf", 'root ::= ""')])
def test_an_answer_without_text_is_one_token(llm, kind, text, fields):
    output = answer(llm, kind, text, **fields)
    assert (output.text, output.finish_reason, len(output.token_ids)) == ("", "stop", 1)


def test_every_kind_of_schema_is_among_the_random_ones():
    """What the test above says that it tries."""
    texts = [json.dumps(random_schema(seed)) for seed in range(200)]
    for keyword in [
        "enum",
        "const",
        "anyOf",
        "$ref",
        "pattern",
        "format",
        "minLength",
        "maxLength",
        "minItems",
        "maxItems",
        "prefixItems",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "additionalProperties",
        "propertyNames",
        "maxProperties",
        "required",
    ]:
        assert sum(f'"{keyword}": ' in text for text in texts) >= 10, keyword
    for kind in ("object", "array", "string", "number", "integer"):
        assert sum(f'"type": "{kind}"' in text for text in texts) >= 10, kind
    assert sum('"next": {"$ref": "#/$defs/node"}' in text for text in texts) >= 10, "recursion"
    assert sum(text.count('"properties"') > 2 for text in texts) >= 10, "objects in one another"
    has_optional = [set(s["properties"]) > set(s["required"]) for s in map(json.loads, texts)]
    assert sum(has_optional) >= 10
    assert len(set(REGEXES)) == 50 and REGEXES[0] == r"\d{3}-\d{3}-\d{4}"


def test_what_does_not_compile_is_refused(llm):
    with pytest.raises(InvalidRequest, match="position 2") as caught:
        answer(llm, "regex", "(a")
    assert caught.value.param == "constraint"


def test_an_answer_that_takes_longer_and_longer_to_match_is_refused_alone(llm, monkeypatch):
    monkeypatch.setattr("engine.grammar.late_matcher.QUICK_S", 0.001)
    monkeypatch.setattr("engine.grammar.late_matcher.MAX_SLOW_S", 0.02)
    (x,) = llm.tokenizer.encode("x", add_special_tokens=False)
    slow = {"logit_bias": {x: 100}, "temperature": 0, "max_tokens": 1000}
    with pytest.raises(InvalidRequest, match="too long to match") as caught:
        answer(llm, "regex", "(x+x+)+y", **slow)
    assert caught.value.param == "constraint"
    assert answer(llm, "regex", "(x+x+)+y", **slow | {"max_tokens": 5}).text == "xxxxx"
