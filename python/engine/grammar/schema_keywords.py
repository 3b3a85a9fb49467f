"""Which keywords of a JSON schema are enforced; a schema that uses any other is refused.

The compiler leaves out what it does not know, here and there without a word. What it enforces was
found out keyword by keyword; docs/structured-output.md has the table, and a test for every line of it.
An answer may be narrower than the schema (no properties that are not declared, patterns matched
whole), never wider.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import unquote

from engine.grammar.errors import GrammarError, Unenforceable
from engine.grammar.regex_limits import check_regex
from engine.grammar.schema_values import endless_ref, wrong_value

ANNOTATIONS = frozenset(
    [
        "$comment",
        "$schema",
        "default",
        "deprecated",
        "description",
        "examples",
        "readOnly",
        "title",
        "writeOnly",
    ]
)
"""Nothing to enforce."""

_YEAR = r"[1-9]\d{3}"
_LEAP_YEAR = r"(?:[1-9]\d(?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26])00)"
_DATE = (
    rf"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)"
    rf"|02-(?:0[1-9]|1\d|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_TIME = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,6})?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
_LABEL = "[A-Za-z0-9]{1,20}(?:-[A-Za-z0-9]{1,20}){0,2}"
_ATOM = "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]{1,20}"
"""Four labels are a name of at most 253 characters, three atoms a mailbox of at most 64. Sources: RFC 1123,
section 2.1, RFC 5321, section 4.5.3.1."""
_BYTE = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"

FORMATS: dict[str, str | None] = {
    "date": _DATE,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": None,
    "email": rf"{_ATOM}(?:\.{_ATOM}){{0,2}}@{_LABEL}(?:\.{_LABEL}){{1,2}}",
    "hostname": rf"{_LABEL}(?:\.{_LABEL}){{0,3}}",
    "ipv4": rf"{_BYTE}(?:\.{_BYTE}){{3}}",
    "ipv6": None,
    "time": _TIME,
    "uri": None,
    "uri-reference": None,
    "uri-template": None,
    "uuid": None,
}
"""Formats that are enforced, with the pattern where the compiler's own is too wide."""

_OF_TYPE = {
    "string": frozenset(["minLength", "maxLength", "pattern", "format"]),
    "number": frozenset(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"]),
    "array": frozenset(["items", "prefixItems", "minItems", "maxItems", "unevaluatedItems", "uniqueItems"]),
    "object": frozenset(
        [
            "properties",
            "required",
            "additionalProperties",
            "unevaluatedProperties",
            "patternProperties",
            "propertyNames",
            "minProperties",
            "maxProperties",
        ]
    ),
}
_ALONE = ("$ref", "allOf", "anyOf", "oneOf", "const", "enum")
"""Beside one of these the compiler looks at nothing else."""

_DEFINITIONS = ("$defs", "definitions")
_TYPES = ("null", "boolean", "object", "array", "number", "string", "integer")
KEYWORDS = frozenset({"type", *_ALONE, *_DEFINITIONS}).union(*_OF_TYPE.values())


class Pattern(NamedTuple):
    """A regular expression, and the place of the schema that has it."""

    regex: str
    at: str


class Enforceable(NamedTuple):
    """The schema as the compiler should get it, its patterns, in whose place it has their numbers, and those
    of its schemas that have `oneOf`, with their places."""

    schema: Any
    patterns: list[Pattern]
    one_ofs: list[tuple[dict[str, Any], str]]


def enforceable(schema: Any, *, looks_for_ends: bool = False, is_parted: bool = False) -> Enforceable:
    """What the compiler needs to enforce a schema.

    `is_parted`: each property becomes a schema of its own with the definitions beside it, so that references
    may lead to these only.

    `looks_for_ends`: references that no finite answer can follow are refused as well, which takes up to the
    square of their number.
    Raises: `GrammarError` that names the first keyword that would not be enforced, and its place.
    """
    walk = _Walk(schema)
    done = walk.schema(schema, "#")
    if strays := [at for target, at in walk.refs.values() if id(target) not in walk.walked]:
        raise refusal(strays[0], "$ref", "is supported only to where a schema stands, as in $defs")
    endless = endless_ref({ref: target for ref, (target, _) in walk.refs.items()}) if looks_for_ends else None
    if endless is not None:
        raise refusal(walk.refs[endless][1], "$ref", "leads to a schema that contains itself without an end")
    for ref, (_, at) in walk.refs.items() if is_parted else ():
        if not ref.startswith(tuple(f"#/{name}/" for name in _DEFINITIONS)):
            raise Unenforceable(f'has "$ref" at {at[:200]}, which leads out of the argument that it is in')
    return Enforceable(done, walk.patterns, walk.one_ofs)


class _Walk:
    def __init__(self, root: Any) -> None:
        self._root = root
        self.patterns: list[Pattern] = []
        self.one_ofs: list[tuple[dict[str, Any], str]] = []
        self.walked: set[int] = set()
        """The objects of the whole schema that are schemas, by their identity."""

        self.refs: dict[str, tuple[Any, str]] = {}
        """What each reference leads to, and the first place that has it."""

    def schema(self, schema: Any, at: str, may_be_false: bool = False) -> Any:
        self.walked.add(id(schema))
        if schema is False and not may_be_false:
            raise Unenforceable(f"has the schema false at {at[:200]}, which nothing matches")
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise GrammarError(f"must have a schema at {at[:200]}, an object or a boolean")
        for keyword in schema:
            if keyword not in KEYWORDS and keyword not in ANNOTATIONS and not keyword.startswith("x-"):
                if keyword == "$id" and at == "#":
                    continue
                raise refusal(at, keyword, "is not supported")
        schema = {key: value for key, value in schema.items() if key not in ANNOTATIONS}
        found = [keyword for keyword in _ALONE if keyword in schema]
        if found:
            return self._alone(schema, found[0], at)
        types = self._types(schema, at)
        for kind, keywords in _OF_TYPE.items():
            for keyword in keywords & schema.keys():
                if kind not in types and not (kind == "number" and "integer" in types):
                    if "type" in schema:
                        schema.pop(keyword)  # says nothing about the types that are allowed
                    else:
                        raise refusal(at, keyword, f"needs a type beside it: {kind}")
        if (wrong := wrong_value(schema, types)) is not None:
            raise refusal(at, *wrong)
        _check_number(schema, types, at)
        if "string" in types:
            self._string(schema, at)
        if "array" in types:
            schema = self._array(schema, at)
        if "object" in types:
            schema = self._object(schema, at)
        return self._inner(schema, at)

    def _types(self, schema: dict[str, Any], at: str) -> list[str]:
        """Types that are allowed; `properties` or `items` alone mean objects and arrays."""
        given = schema.get("type")
        if given is None:
            for keyword, kind in (("properties", "object"), ("items", "array"), ("prefixItems", "array")):
                if keyword in schema:
                    schema["type"] = kind
                    return [kind]
            return []
        types = given if isinstance(given, list) else [given]
        if not types or not all(isinstance(kind, str) and kind in _TYPES for kind in types):
            raise refusal(at, "type", f"must be one or more of {', '.join(_TYPES)}")
        return types

    def _alone(self, schema: dict[str, Any], keyword: str, at: str) -> Any:
        others = schema.keys() - {keyword, *_DEFINITIONS, "$id"}
        if keyword in ("const", "enum"):
            others.discard("type")
        if others:
            other = min(others)
            raise refusal(at, other, f"is not supported beside {keyword!r}")
        if keyword == "$ref":
            self._check_ref(schema["$ref"], at)
        elif keyword in ("const", "enum"):
            self._check_values(schema, keyword, at)
            return {key: value for key, value in schema.items() if key != "type"}
        else:
            branches = schema[keyword]
            if not isinstance(branches, list) or not branches:
                raise refusal(at, keyword, "must be a non-empty array")
            if keyword == "allOf" and len(branches) > 1:
                raise refusal(at, keyword, "is supported with a single schema only")
        return self._inner(schema, at)

    def _check_values(self, schema: dict[str, Any], keyword: str, at: str) -> None:
        values = schema["enum"] if keyword == "enum" else [schema["const"]]
        if not isinstance(values, list) or not values:
            raise refusal(at, keyword, "must be a non-empty array")
        types = self._types(schema, at)
        for value in values:
            if types and not any(_has_type(value, kind) for kind in types):
                raise refusal(at, keyword, f"has a value of another type than {', '.join(types)}")

    def _check_ref(self, ref: Any, at: str) -> None:
        """Follow references to a schema; only those within the document can be followed."""
        seen = set()
        while isinstance(ref, str) and ref not in seen:
            seen.add(ref)
            if ref != "#" and not ref.startswith("#/"):
                raise refusal(at, "$ref", "must be a JSON pointer within the schema, like #/$defs/name")
            if "~" in ref or "%" in ref:
                raise refusal(at, "$ref", "with escaped characters is not supported")
            target = self._root
            for step in ref.split("/")[1:]:
                if not isinstance(target, dict) or unquote(step) not in target:
                    raise refusal(at, "$ref", f"leads nowhere: {ref[:100]}")
                target = target[step]
            if target is False:
                raise refusal(at, "$ref", "is not supported to the schema false, which nothing matches")
            self.refs.setdefault(ref, (target, at))
            if not isinstance(target, dict) or "$ref" not in target:
                return
            ref = target["$ref"]
        raise refusal(at, "$ref", "refers to nothing but itself" if ref in seen else "must be a string")

    def _string(self, schema: dict[str, Any], at: str) -> None:
        if "format" in schema and schema["format"] not in list(FORMATS):  # it may be anything
            raise refusal(at, "format", f"must be one of {', '.join(FORMATS)}")
        first = next((keyword for keyword in ("pattern", "format") if keyword in schema), None)
        for other in ("format", "minLength", "maxLength"):
            if first is not None and other in schema and other != first:
                raise refusal(at, other, f"is not supported beside {first!r}")
        if FORMATS.get(schema.get("format", "")) is not None:
            schema["pattern"] = FORMATS[schema.pop("format")]
        if "pattern" in schema:
            schema["pattern"] = self._pattern(schema["pattern"], at)

    def _pattern(self, pattern: Any, at: str) -> str:
        if not isinstance(pattern, str):
            raise refusal(at, "pattern", "must be a string")
        check_regex(pattern, f" at {at[:200]}/pattern")
        self.patterns.append(Pattern(pattern, at))
        return str(len(self.patterns) - 1)

    def _array(self, schema: dict[str, Any], at: str) -> dict[str, Any]:
        if schema.get("uniqueItems"):
            raise refusal(at, "uniqueItems", "is not supported")
        schema.pop("uniqueItems", None)
        if not schema.keys() & {"items", "prefixItems", "unevaluatedItems"}:
            return {**schema, "items": True}
        return schema

    def _object(self, schema: dict[str, Any], at: str) -> dict[str, Any]:
        properties = schema.get("properties", {})
        if not isinstance(properties, dict):
            raise refusal(at, "properties", "must be an object")
        required = schema.get("required", [])
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise refusal(at, "required", "must be an array of strings")
        for name in required:
            if name not in properties:
                raise refusal(at, "required", f"names {name[:40]!r}, which is not one of the properties")
        others = [key for key in ("additionalProperties", "unevaluatedProperties") if schema.get(key, False)]
        patterns = schema.get("patternProperties", {})
        if not isinstance(patterns, dict):
            raise refusal(at, "patternProperties", "must be an object")
        if patterns and (len(patterns) > 1 or properties or others):
            raise refusal(at, "patternProperties", "is supported alone only, with a single pattern")
        if patterns:
            schema["patternProperties"] = {self._pattern(key, at): value for key, value in patterns.items()}
        if "propertyNames" in schema and properties:
            raise refusal(at, "propertyNames", "is not supported beside properties")
        if "propertyNames" in schema and not others:
            raise refusal(at, "propertyNames", "is supported beside additionalProperties only")
        is_open = bool(others or patterns or not schema.keys() - {"type", "minProperties", "maxProperties"})
        if is_open and schema.get("minProperties", 0) > max(1, len(required)):
            raise refusal(at, "minProperties", "above 1 is supported for declared properties only")
        has_bounds = "minProperties" in schema or "maxProperties" in schema
        if has_bounds and not schema.keys() & {"properties", "additionalProperties", "patternProperties"}:
            return {**schema, "additionalProperties": True}
        return schema

    def _inner(self, schema: dict[str, Any], at: str) -> dict[str, Any]:
        """The same with every schema inside of it checked."""
        done = dict(schema)
        if "oneOf" in done:
            self.one_ofs.append((done, at))
        for keyword, value in schema.items():
            place = f"{at}/{keyword}"
            if keyword in ("properties", "patternProperties", *_DEFINITIONS):
                if not isinstance(value, dict):
                    raise refusal(at, keyword, "must be an object")
                done[keyword] = {
                    name: self.schema(inner, f"{place}/{name}", may_be_false=keyword in _DEFINITIONS)
                    for name, inner in value.items()
                }
            elif keyword in ("anyOf", "allOf", "oneOf", "prefixItems"):
                if not isinstance(value, list):
                    raise refusal(at, keyword, "must be an array")
                done[keyword] = [self.schema(inner, f"{place}/{i}") for i, inner in enumerate(value)]
            elif keyword in ("items", "additionalProperties", "unevaluatedItems", "unevaluatedProperties"):
                done[keyword] = self.schema(value, place, may_be_false=True)
            elif keyword == "propertyNames":
                done[keyword] = self._names(value, place)
        return done

    def _names(self, schema: Any, at: str) -> Any:
        """Names are strings anyway."""
        if not isinstance(schema, dict):
            raise GrammarError(f"must have an object at {at}")
        for keyword in schema.keys() - ANNOTATIONS - {"type", "minLength", "maxLength", "pattern"}:
            raise refusal(at, keyword, "is not supported for names")
        return self.schema({**schema, "type": "string"}, at)


def _check_number(schema: dict[str, Any], types: list[str], at: str) -> None:
    if "multipleOf" not in schema or not {"number", "integer"} & set(types):
        return
    if "number" in types or not isinstance(schema["multipleOf"], int):
        raise refusal(at, "multipleOf", "is supported for integers only")
    for keyword in _OF_TYPE["number"] - {"multipleOf"}:
        if keyword in schema:
            raise refusal(at, "multipleOf", f"is not supported beside {keyword!r}")


_IS: dict[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "integer": lambda value: (
        not isinstance(value, bool)
        and (isinstance(value, int) or (isinstance(value, float) and value.is_integer()))
    ),
}


def _has_type(value: Any, kind: str) -> bool:
    return _IS[kind](value)


def refusal(at: str, keyword: str, what: str) -> GrammarError:
    """The error for a keyword at a place."""
    is_wrong = what.startswith(("must", "leads", "refers")) and keyword != "format"
    error = GrammarError if is_wrong else Unenforceable
    return error(f"has {json.dumps(keyword)} at {at[:200]}, which {what}")
