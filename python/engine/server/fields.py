"""Reading one JSON object field by field, with errors that name the field.

null counts as unset. A whole number may be written 3.0; numbers in strings are refused. What no
reader asked for is left over, and reported by `unread`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from engine.errors import InvalidRequest


class Fields:
    """The fields of one JSON object, each read at most once."""

    def __init__(self, values: dict[str, Any], path: str = "") -> None:
        self._values = {name: value for name, value in values.items() if value is not None}
        self._given = frozenset(values)
        self._path = path
        self._children: list[Fields] = []

    def unread(self) -> list[str]:
        """Names that nobody asked for, here and in the objects read from here."""
        below = [name for child in self._children for name in child.unread()]
        return [self.name_of(name) for name in self._values] + below

    def name_of(self, name: str) -> str:
        """The field's name with its place in the request, as reported to the client."""
        return f"{self._path}.{name}" if self._path else name

    def raw(self, name: str) -> Any:
        """Any value; None when unset."""
        return self._values.pop(name, None)

    def peek(self, name: str) -> Any:
        """Like `raw`, but the field counts as unread."""
        return self._values.get(name)

    def names(self) -> list[str]:
        """Names of the fields that are set and not read yet."""
        return list(self._values)

    def has_any(self, names: Iterable[str]) -> bool:
        """Whether any of these is set and not read yet."""
        return not self._values.keys().isdisjoint(names)

    def is_given(self, name: str) -> bool:
        """Whether the field was there at all, if only as null."""
        return name in self._given

    def fail(self, name: str, what: str, *, slug: str | None = None) -> InvalidRequest:
        """An error about a field, to be raised: `what` goes on after its name."""
        full_name = self.name_of(name)
        return InvalidRequest(f"{full_name} {what}", slug=slug, param=full_name)

    def require(self, name: str) -> None:
        if name not in self._values:
            raise self.fail(name, "is required", slug="missing_required_parameter")

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self.raw(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong_type(name, "true or false", value)
        return value

    def integer(self, name: str) -> int | None:
        value = self.raw(name)
        return None if value is None else self._to_integer(name, value)

    def number(self, name: str) -> float | None:
        value = self.raw(name)
        return None if value is None else self._to_number(name, value)

    def text(self, name: str) -> str | None:
        value = self.raw(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong_type(name, "a string", value)
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """One string or a list of strings."""
        value = self.raw(name)
        if value is None:
            return ()
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise self._wrong_type(name, "a string or an array of strings", value)
        return tuple(items)

    def integers(self, name: str, *, at_most: int) -> tuple[int, ...]:
        value = self.raw(name)
        if value is None:
            return ()
        if not isinstance(value, list):
            raise self._wrong_type(name, "an array of integers", value)
        if len(value) > at_most:
            raise self.fail(name, f"may hold at most {at_most} integers, got {len(value)}")
        return tuple(self._to_integer(name, item) for item in value)

    def items(self, name: str) -> list[Any]:
        value = self.raw(name)
        if value is not None and not isinstance(value, list):
            raise self._wrong_type(name, "an array", value)
        return value or []

    def mapping(self, name: str) -> dict[str, Any] | None:
        """An object that is taken as it is."""
        value = self.raw(name)
        if value is not None and not isinstance(value, dict):
            raise self._wrong_type(name, "an object", value)
        return value

    def object(self, name: str) -> Fields:
        """A nested object; an unset one has no fields."""
        return self._child(self.mapping(name) or {}, name)

    def objects(self, name: str) -> list[Fields]:
        """An array of objects; an unset one is empty."""
        children = []
        for i, item in enumerate(self.items(name)):
            if not isinstance(item, dict):
                raise self.fail(name, f"must hold objects, got {json_type(item)} at {i}")
            children.append(self._child(item, f"{name}[{i}]"))
        return children

    def biases(self, name: str) -> dict[int, float]:
        """A map from token ids, which JSON writes as strings, to numbers."""
        value = self.raw(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self._wrong_type(name, "an object", value)
        biases = {}
        for key, bias in value.items():
            # int() alone would also take "1_0", " 7" and digits of other scripts.
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise self.fail(name, f"must have token ids as keys, got {key[:20]!r}")
            biases[int(key)] = self._to_number(name, bias)
        return biases

    def refuse(self, neutral_values: dict[str, tuple[Any, ...]], names: Iterable[str]) -> None:
        """Refuse those of `names` that are set to something else than their neutral values."""
        for name in sorted(self._values.keys() & names):  # of many names hardly any is given
            value = self.raw(name)
            if value not in neutral_values[name]:
                raise self.fail(name, "is not supported by this server", slug="unsupported_parameter")

    def _child(self, values: dict[str, Any], name: str) -> Fields:
        child = Fields(values, self.name_of(name))
        self._children.append(child)
        return child

    def _to_integer(self, name: str, value: Any) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong_type(name, "an integer", value)
        if not -(2**63) <= value < 2**63:
            raise self.fail(name, "must fit a signed 64-bit integer")
        return value

    def _to_number(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong_type(name, "a number", value)
        try:
            return float(value)
        except OverflowError:
            raise self.fail(name, "is too large a number") from None

    def _wrong_type(self, name: str, expected: str, value: Any) -> InvalidRequest:
        return self.fail(name, f"must be {expected}, got {json_type(value)}")


def json_type(value: Any) -> str:
    """What a JSON value is called in messages."""
    if value is None:
        return "null"
    names = (
        (bool, "a boolean"),
        (int, "an integer"),
        (float, "a number"),
        (str, "a string"),
        (list, "an array"),
    )
    return next((name for kind, name in names if isinstance(value, kind)), "an object")
