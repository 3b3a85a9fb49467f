"""One constraint a request: every two fields that make one are refused together, whatever they are."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from helpers.errors import check_error
from helpers.http_server import Server

SCHEMA = {"type": "integer"}
TAG = {"type": "structural_tag", "format": {"type": "const_string", "value": "a"}}
FIELDS: dict[str, Any] = {
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
    "regex": "a",
    "guided_regex": "a",
    "ebnf": 'root ::= "a"',
    "guided_grammar": 'root ::= "a"',
    "json_schema": json.dumps(SCHEMA),
    "guided_json": SCHEMA,
    "choice": ["a"],
    "guided_choice": ["a"],
    "structural_tag": TAG,
    "structured_outputs": {"regex": "a"},
}
FORMATS = [{"type": "json_object"}, TAG]


@pytest.mark.parametrize("names", list(itertools.combinations(FIELDS, 2)), ids=" and ".join)
def test_two_constraints(server: Server, names: tuple[str, str]) -> None:
    fields = {name: FIELDS[name] for name in names}
    for ask in (server.chat, server.complete):
        for extra in ({}, {"stream": True}, {"n": 2}):
            response = ask(**fields, **extra)
            assert response.status_code == 400 and "only one constraint" in response.text
            assert response.json()["param"].split(".")[0] in names
    assert not server.engine.submitted


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "response_format"])
@pytest.mark.parametrize("form", FORMATS, ids=["json_object", "structural_tag"])
def test_a_format_and_another(server: Server, name: str, form: Any) -> None:
    response = server.chat(response_format=form, **{name: FIELDS[name]})
    assert response.status_code == 400 and "only one constraint" in response.text


def test_two_within_one_field(server: Server) -> None:
    response = server.chat(structured_outputs={"regex": "a", "choice": ["a"]})
    check_error(response, 400, "invalid_value", "structured_outputs.choice")


@pytest.mark.parametrize("name", FIELDS)
def test_one_is_taken(server: Server, name: str) -> None:
    """By both endpoints, and beside fields that say that there is none."""
    for ask in (server.chat, server.complete):
        response = ask(
            **{"response_format": {"type": "text"}, "regex": None, "choice": None, name: FIELDS[name]}
        )
        assert response.status_code == 200, response.text
        constraint = server.engine.submitted[-1].params.constraint
        assert constraint is not None and constraint.param.split(".")[0] == name
