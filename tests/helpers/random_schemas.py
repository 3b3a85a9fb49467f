"""JSON schemas drawn by chance, of everything that structured output enforces and that comes to an end."""

from __future__ import annotations

import random
from typing import Any

from engine.grammar.schema_keywords import FORMATS

Schema = dict[str, Any]

PATTERNS = (
    "^[a-z]{1,8}$",
    r"^\d{3}-\d{4}$",
    "^(red|green|blue)( [0-9]{1,2})?$",
    r"^[A-Z]\w{0,6}$",
    "^.{2,9}$",
)
SHORT_FORMATS = ("date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uuid")


def random_schema(seed: int) -> Schema:
    """An object, nested at most four deep."""
    return _Drawn(random.Random(seed)).whole()


class _Drawn:
    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self._definitions: Schema = {}

    def whole(self) -> Schema:
        schema = self._object(3)
        if self._definitions:
            schema["$defs"] = self._definitions
        return schema

    def _any(self, depth: int) -> Schema:
        leaves = [self._string, self._number, self._integer, self._enum, self._const, self._simple]
        nested = [self._object, self._array, self._any_of, self._ref, self._list, self._map]
        kind = self._draw.choice(leaves * 2 + nested if depth else leaves)
        schema = kind(depth - 1) if kind in nested else kind()
        if self._draw.random() < 0.2:
            schema["description"] = "what 'it' is"
        return schema

    def _object(self, depth: int) -> Schema:
        names = self._draw.sample(["name", "a", "b c", "é", "size", 'quo"te', "x_1", "", "kind", "日本"], 4)
        properties = {name: self._any(depth) for name in names[: self._draw.randint(1, 4)]}
        required = [name for name in properties if self._draw.random() < 0.7]
        schema: Schema = {"type": "object", "properties": properties, "required": required}
        if self._draw.random() < 0.5:
            schema["additionalProperties"] = False
        return schema

    def _array(self, depth: int) -> Schema:
        least = self._draw.randint(0, 2)
        bounds = {"minItems": least, "maxItems": least + self._draw.randint(0, 3)}
        if self._draw.random() < 0.3:
            return {"type": "array", "prefixItems": [self._any(depth), self._any(depth)], "items": False}
        return {"type": "array", "items": self._any(depth), **bounds}

    def _any_of(self, depth: int) -> Schema:
        return {"anyOf": [self._any(depth) for _ in range(self._draw.randint(2, 3))]}

    def _ref(self, depth: int) -> Schema:
        name = f"d{len(self._definitions)}"
        self._definitions[name] = {}
        self._definitions[name] = self._any(depth)
        return {"$ref": f"#/$defs/{name}"}

    def _list(self, depth: int) -> Schema:
        """Recursion."""
        value = self._any(0)
        node = {
            "type": "object",
            "properties": {"v": value, "next": {"$ref": "#/$defs/node"}},
            "required": ["v"],
        }
        self._definitions["node"] = node
        return {"$ref": "#/$defs/node"}

    def _map(self, depth: int) -> Schema:
        names = {"maxLength": 5}
        return {
            "type": "object",
            "additionalProperties": self._any(0),
            "propertyNames": names,
            "maxProperties": 2,
        }

    def _string(self) -> Schema:
        match self._draw.randrange(3):
            case 0:
                return {"type": "string", "pattern": self._draw.choice(PATTERNS)}
            case 1:
                assert set(SHORT_FORMATS) <= FORMATS.keys()
                return {"type": "string", "format": self._draw.choice(SHORT_FORMATS)}
        least = self._draw.randint(0, 3)
        return {"type": "string", "minLength": least, "maxLength": least + self._draw.randint(0, 20)}

    def _integer(self) -> Schema:
        least = self._draw.randint(-1000, 1000)
        return {"type": "integer", "minimum": least, "maximum": least + self._draw.randint(0, 10**4)}

    def _number(self) -> Schema:
        least = self._draw.randint(-50, 50) / 4
        most = least + self._draw.randint(1, 400) / 8
        lower = self._draw.choice(["minimum", "exclusiveMinimum"])
        upper = self._draw.choice(["maximum", "exclusiveMaximum"])
        return {"type": "number", lower: least, upper: most}

    def _enum(self) -> Schema:
        values = ["red", "a b", "", 1, -2.5, None, True, "日本", '"\\\n']
        return {"enum": self._draw.sample(values, self._draw.randint(1, 4))}

    def _const(self) -> Schema:
        return {"const": self._draw.choice(["fixed", 7, False, {"k": ["v", 1]}, "tab\there"])}

    def _simple(self) -> Schema:
        return {"type": self._draw.choice(["boolean", "null", ["boolean", "null"]])}
