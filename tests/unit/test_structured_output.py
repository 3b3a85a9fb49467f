"""Constrained answers of the bundled model: they match, they end by themselves, and forced text is free."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest

from engine import LLM, SamplingParams
from engine.errors import InvalidRequest
from engine.sampling.constraint import Constraint

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


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


def test_what_does_not_compile_is_refused(llm):
    with pytest.raises(InvalidRequest, match="position 3") as caught:
        answer(llm, "regex", "(a")
    assert caught.value.param == "constraint"
