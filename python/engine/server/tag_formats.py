"""Formats of structural tags: texts, sequences, and what a constraint of its own would hold an answer to."""

from __future__ import annotations

import json
from typing import Any

from engine.errors import InvalidRequest
from engine.grammar.errors import GrammarError
from engine.grammar.schema_keywords import enforceable
from engine.sampling.constraint import Constraint

Format = dict[str, Any]
"""A format of xgrammar's structural tags."""


def text_format(value: str) -> Format:
    return {"type": "const_string", "value": value}


def sequence(*elements: Format) -> Format:
    present = [element for element in elements if element != text_format("")]
    return present[0] if len(present) == 1 else {"type": "sequence", "elements": present}


def answer_format(answer: Constraint) -> Format:
    """The same constraint as a part of a tag. Raises: `InvalidRequest`."""
    match answer.kind:
        case "json_schema":
            schema = _parsed(answer)
            _check(schema, answer)
            return {"type": "json_schema", "json_schema": schema}
        case "json_object":
            return {"type": "json_schema", "json_schema": {"type": "object"}}
        case "regex":
            return {"type": "regex", "pattern": answer.text}
        case "ebnf":
            return {"type": "grammar", "grammar": answer.text}
        case "choice":
            return {"type": "or", "elements": [text_format(choice) for choice in _choices(answer)]}
        case _:
            tag = _parsed(answer)
            if not isinstance(tag, dict) or not isinstance(tag.get("format"), dict) or len(tag) > 2:
                raise _wrong(answer, "must be an object with a type and a format")
            return tag["format"]


def _choices(answer: Constraint) -> list[str]:
    choices = _parsed(answer)
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) for c in choices):
        raise _wrong(answer, "must be a non-empty array of strings")
    return choices


def _parsed(answer: Constraint) -> Any:
    try:
        return json.loads(answer.text)
    except (ValueError, RecursionError) as error:
        raise _wrong(answer, error) from None


def _check(schema: Any, answer: Constraint) -> None:
    try:
        enforceable(schema)
    except GrammarError as error:
        raise _wrong(answer, error) from None
    except RecursionError:
        raise _wrong(answer, "is nested too deeply") from None


def _wrong(answer: Constraint, what: object) -> InvalidRequest:
    return InvalidRequest(f"Invalid request: {answer.param} {what}", param=answer.param)
