"""Whether a schema can be met: bounds that are no contradiction, references that come to an end."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from fractions import Fraction
from typing import Any

_COUNTS = (("minLength", "maxLength"), ("minItems", "maxItems"), ("minProperties", "maxProperties"))
_NUMBERS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "multipleOf")
_MOST, _MOST_COUNTED = 2**63 - 1, 2**31 - 1


def wrong_value(schema: Mapping[str, Any], types: Collection[str]) -> tuple[str, str] | None:
    """The keyword whose value nothing of these types can be held to, and what is wrong with it."""
    for least, most in _COUNTS:
        for keyword in (least, most):
            value = schema.get(keyword, 0)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST_COUNTED:
                return keyword, f"must be a whole number from 0 to {_MOST_COUNTED}"
        if most in schema and schema.get(least, 0) > schema[most]:
            return least, f"must be at most {most!r}"
    first = schema.get("prefixItems")
    if isinstance(first, list) and schema.get("maxItems", len(first)) < len(first):
        return "maxItems", "is not supported below the number of 'prefixItems'"
    for keyword in _NUMBERS:
        value = schema.get(keyword, 0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e308:
            return keyword, "must be a number below 1e308"
        if abs(value) > _MOST and "integer" in types:
            return keyword, "is not supported beyond 64 bits"
        if "integer" in types and value % 1:
            return keyword, "is supported for integers as a whole number only"
    if schema.get("multipleOf", 1) <= 0:
        return "multipleOf", "must be above 0"
    for least in ("minimum", "exclusiveMinimum"):
        for most in ("maximum", "exclusiveMaximum"):
            if least in schema and most in schema:
                may_be_equal = (least, most) == ("minimum", "maximum")
                if schema[least] > schema[most] or (schema[least] == schema[most] and not may_be_equal):
                    return least, f"must be below {most!r}"
                if "number" in types and not _has_decimal(schema):
                    return least, f"is not supported so near to {most!r}: numbers have six decimals at most"
    return None


def _has_decimal(schema: Mapping[str, Any]) -> bool:
    """Whether any number that the compiler writes is within the bounds: it ends at millionths."""
    steps = {name: 10**6 * Fraction(str(schema[name])) for name in _NUMBERS[:4] if name in schema}
    lows = [math.ceil(v) if k == "minimum" else math.floor(v) + 1 for k, v in steps.items() if "inim" in k]
    highs = [math.floor(v) if k == "maximum" else math.ceil(v) - 1 for k, v in steps.items() if "axim" in k]
    return max(lows) <= min(highs)


def endless_ref(refs: Mapping[str, Any]) -> str | None:
    """The first of these references, to the schemas beside them, that no finite answer can follow."""
    ending: set[str] = set()
    while True:
        found = [ref for ref, target in refs.items() if ref not in ending and _ends(target, ending)]
        if not found:
            return next((ref for ref in refs if ref not in ending), None)
        ending.update(found)


def _ends(schema: Any, ending: set[str]) -> bool:
    """Whether some answer to a schema needs only references of `ending`."""
    if not isinstance(schema, dict):
        return True
    if "$ref" in schema:
        return schema["$ref"] in ending
    for keyword, are_enough in (("allOf", all), ("anyOf", any), ("oneOf", any)):
        if keyword in schema:
            return are_enough(_ends(branch, ending) for branch in schema[keyword])
    types = schema.get("type", [])
    types = types if isinstance(types, list) else [types]
    if not types:
        types = ["object"] if "properties" in schema else ["array"]
    return any(_ENDS_OF_TYPE.get(kind, lambda *_: True)(schema, ending) for kind in types)


def _object_ends(schema: dict[str, Any], ending: set[str]) -> bool:
    properties = schema.get("properties", {})
    return all(_ends(properties[name], ending) for name in schema.get("required", ()))


def _array_ends(schema: dict[str, Any], ending: set[str]) -> bool:
    num_items, first = schema.get("minItems", 0), schema.get("prefixItems", [])
    if num_items > len(first) and not _ends(schema.get("items", True), ending):
        return False
    return all(_ends(item, ending) for item in first[:num_items])


_ENDS_OF_TYPE: dict[str, Callable[[dict[str, Any], set[str]], bool]] = {
    "object": _object_ends,
    "array": _array_ends,
}
