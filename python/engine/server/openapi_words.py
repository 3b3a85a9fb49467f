"""The words that the schemas of requests and answers are written in: JSON Schema in little."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
NONEMPTY: Schema = {"type": "string", "minLength": 1}
BOOLEAN: Schema = {"type": "boolean"}
INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
ANY_OBJECT: Schema = {"type": "object", "additionalProperties": True}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def array(items: Schema, most: int | None = None, least: int | None = None) -> Schema:
    bounds = {"minItems": least, "maxItems": most}
    return {"type": "array", "items": items} | {k: v for k, v in bounds.items() if v is not None}


def optional(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def bounded(schema: Schema, least: float | None = None, most: float | None = None) -> Schema:
    bounds = {"minimum": least, "maximum": most}
    return schema | {name: value for name, value in bounds.items() if value is not None}


def answer(may_have: Mapping[str, Schema] | None = None, /, **properties: Schema) -> Schema:
    """An object that has at least these fields; some have those of `may_have` too."""
    return {"type": "object", "properties": {**properties, **(may_have or {})}, "required": list(properties)}


def request(required: dict[str, Schema], may_have: dict[str, Schema]) -> Schema:
    """Unknown fields are allowed; they are named in the header x-ignored-params."""
    properties = required | {name: optional(schema) for name, schema in may_have.items()}
    return {"type": "object", "properties": properties, "required": list(required)}


def given(name: str, **wanted: Any) -> Schema:
    """A further condition on an object: it has the field, with a value that is not null."""
    return {"required": [name], "properties": {name: wanted or {"not": {"type": "null"}}}}
