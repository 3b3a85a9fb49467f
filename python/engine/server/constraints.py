"""The fields of a request that say what its answer must look like; at most one of them may be set."""

from __future__ import annotations

from typing import Any

import msgspec

from engine.errors import InvalidRequest
from engine.sampling.constraint import Constraint, ConstraintKind
from engine.server.fields import Fields, json_type

_TEXT_FIELDS: dict[str, ConstraintKind] = {
    "regex": "regex",
    "guided_regex": "regex",
    "ebnf": "ebnf",
    "guided_grammar": "ebnf",
    "json_schema": "json_schema",
}
_VALUE_FIELDS: dict[str, ConstraintKind] = {
    "guided_json": "json_schema",
    "choice": "choice",
    "guided_choice": "choice",
    "structural_tag": "structural_tag",
}
_OBJECT_FIELDS = ("response_format", "structured_outputs")
_FIELDS = (*_TEXT_FIELDS, *_VALUE_FIELDS, *_OBJECT_FIELDS)
# The names inside of `structured_outputs`.
_STRUCTURED_OUTPUTS: dict[str, ConstraintKind] = {
    "json": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "grammar": "ebnf",
    "structural_tag": "structural_tag",
}


def read_constraint(fields: Fields) -> Constraint | None:
    """Raises: `InvalidRequest` for more than one constraint, or one that is not even of the right type."""
    if not fields.has_any(_FIELDS):  # as most requests
        return None
    found = [
        *_response_format(fields),
        *_texts(fields, _TEXT_FIELDS),
        *_values(fields, _VALUE_FIELDS),
        *_structured_outputs(fields),
    ]
    if len(found) > 1:
        names = ", ".join(constraint.param for constraint in found)
        raise InvalidRequest(f"only one constraint may be set, got {names}", param=found[1].param)
    return found[0] if found else None


def _response_format(fields: Fields) -> list[Constraint]:
    is_set = fields.peek("response_format") is not None
    form = fields.object("response_format")
    if not is_set:
        return []
    form.require("type")
    kind = form.text("type")
    if kind == "text":
        return []
    if kind == "json_object":
        return [Constraint("json_object", param="response_format")]
    if kind == "json_schema":
        form.require("json_schema")
        described = form.object("json_schema")
        described.require("schema")
        for name in ("name", "description"):
            described.text(name)
        described.boolean("strict")  # a schema is always enforced
        return [_constraint(described, "schema", described.raw("schema"), "json_schema")]
    if kind == "structural_tag":
        tag = {"type": kind} | {name: form.raw(name) for name in form.names()}
        return [Constraint("structural_tag", _encode(tag), param="response_format")]
    allowed = ", ".join(("text", "json_object", "json_schema", "structural_tag"))
    raise form.fail("type", f"must be one of {allowed}, got {kind!r:.40}")


def _texts(fields: Fields, names: dict[str, ConstraintKind]) -> list[Constraint]:
    return [
        Constraint(kind, text, param=fields.name_of(name))
        for name, kind in names.items()
        if (text := fields.text(name))
    ]


def _values(fields: Fields, names: dict[str, ConstraintKind]) -> list[Constraint]:
    values = {name: fields.raw(name) for name in names}
    return [
        _constraint(fields, name, value, names[name]) for name, value in values.items() if value is not None
    ]


def _structured_outputs(fields: Fields) -> list[Constraint]:
    inner = fields.object("structured_outputs")
    found = _values(inner, _STRUCTURED_OUTPUTS)
    if inner.boolean("json_object"):
        found.append(Constraint("json_object", param=inner.name_of("json_object")))
    return found


def _constraint(fields: Fields, name: str, value: Any, kind: ConstraintKind) -> Constraint:
    """A value that may be given as JSON, or as text that holds JSON."""
    if kind in ("regex", "ebnf") and not isinstance(value, str):
        raise fields.fail(name, f"must be a string, got {json_type(value)}")
    if kind == "structural_tag" and not isinstance(value, (str, dict)):
        raise fields.fail(name, f"must be an object, got {json_type(value)}")
    if kind == "json_schema" and not isinstance(value, (str, dict, bool)):
        raise fields.fail(name, f"must be an object, got {json_type(value)}")
    if kind == "choice" and not isinstance(value, list):
        raise fields.fail(name, f"must be an array of strings, got {json_type(value)}")
    text = value if isinstance(value, str) else _encode(value)
    return Constraint(kind, text, param=fields.name_of(name))


def _encode(value: Any) -> str:
    return msgspec.json.encode(value).decode()
