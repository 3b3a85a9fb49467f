"""A grammar in GBNF as its author wrote it: what each rule stands for, and where it is.

Only that much is read as tells where a grammar is too large, or never ends. The rest is the compiler's.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from engine.grammar.compiler_voice import heard
from engine.grammar.errors import GrammarError
from engine.grammar.grammar_text import without_surrogates
from engine.grammar.half_characters import check_whole_characters

MOST = 1e300
"""Sizes end here: a rule may stand for more than a number can say."""

_NAME = r"[A-Za-z_.-][\w.-]*"
_LEXEME = re.compile(
    r'#[^\n]*|"(?:[^"\\\n]|\\.)*"?|\[(?:[^\]\\]|\\.)*\]?'
    rf"|(?P<rule>{_NAME})(?:\[[^\[\]\n]*\])?\s*::="
    rf"|(?P<name>{_NAME})"
    r"|\{\s*(?P<least>\d+)\s*(?P<comma>,\s*(?P<most>\d*)\s*)?\}|(?P<sign>[()|*+?])",
    re.DOTALL | re.ASCII,
)


class Largest(NamedTuple):
    """A rule or a repetition with its place, and the elements that it stands for."""

    size: float
    what: str


def enforceable_gbnf(bindings: Any, text: str, place: str = "") -> str:
    """A grammar as the compiler should get it, whose answers are text.

    Raises: `GrammarError` with the place of a rule that nothing can end, of an escape that is no character,
    or of what the compiler does not read; `place` is put behind it.
    """
    check_whole_characters(text, place)
    rule = GbnfSource(text).endless()
    if rule is not None:
        raise GrammarError(f"never ends: {rule} leads to itself in every alternative{place}")
    with heard(place):
        printed = bindings.Grammar.from_ebnf(text, "root").to_string()
    enforceable = without_surrogates(printed)
    return text if enforceable == printed else enforceable


class _Item:
    """An element of a rule: a reference, or something without a name; and how often it comes."""

    __slots__ = ("is_needed", "most", "name")

    def __init__(self, name: str | None) -> None:
        self.name, self.most, self.is_needed = name, 1.0, True


class _Rule:
    """Alternatives of items, and the repetitions among them with their places."""

    def __init__(self) -> None:
        self.alternatives: list[list[_Item]] = [[]]
        self.repeated: list[tuple[_Item, re.Match[str]]] = []

    @property
    def items(self) -> list[_Item]:
        return [item for items in self.alternatives for item in items]


class GbnfSource:
    """The rules of a grammar. What is no grammar is read as far as it goes."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._starts = {m["rule"]: m.start() for m in _LEXEME.finditer(text) if m["rule"] is not None}
        self._rules: dict[str, _Rule] = {}
        self._read()

    def endless(self) -> str | None:
        """The first rule, as written, that leads to itself in every alternative; with its place."""
        users: dict[str, list[tuple[str, set[str]]]] = {}
        found = []
        for name, rule in self._rules.items():
            for items in rule.alternatives:  # what is not defined is left to the compiler
                needed = {i.name for i in items if i.is_needed and i.name in self._rules}
                for inner in needed:
                    users.setdefault(inner or "", []).append((name, needed))
                if not needed:
                    found.append(name)
        ending: set[str] = set()
        while found:
            name = found.pop()
            if name not in ending:
                ending.add(name)
                for user, needed in users.get(name, ()):
                    needed.discard(name)
                    if not needed:
                        found.append(user)
        reached = self._reached()
        name = next((name for name in self._starts if name in reached and name not in ending), None)
        seen = set()
        while name is not None and name not in seen:
            if name in self._starts:
                seen.add(name)
            needed = {i.name for i in self._rules[name].alternatives[0] if i.is_needed}
            name = next(inner for inner in needed if inner in self._rules and inner not in ending)
        return name and self._named(name)

    def _reached(self) -> set[str]:
        """Rules that answers may need."""
        reached, waiting = set(), ["root"]
        while waiting:
            name = waiting.pop()
            if name in self._rules and name not in reached:
                reached.add(name)
                waiting.extend(item.name for item in self._rules[name].items if item.name is not None)
        return reached

    def largest(self) -> Largest:
        """The least repetition or rule that stands for more than half of what the largest stands for."""
        sizes = self._sizes()
        half = max((sizes[name] for name in self._starts), default=0.0) / 2
        rules = [(sizes[name], name) for name in self._starts if sizes[name] > half]
        repeated = [
            (size, match)
            for rule in self._rules.values()
            for item, match in rule.repeated
            if (size := _item_size(item, sizes)) > half
        ]
        if not rules and not repeated:
            return Largest(0, "line 1, column 1")
        size, found = min([*repeated, *rules], key=lambda each: each[0])
        if isinstance(found, str):
            return Largest(size, self._named(found))
        return Largest(size, f"{found[0][:40]} at {self._where(found.start())}")

    def _named(self, name: str) -> str:
        return f"rule {name[:40]} at {self._where(self._starts[name])}"

    def _where(self, at: int) -> str:
        line = self._text.count("\n", 0, at) + 1
        return f"line {line}, column {at - self._text.rfind(chr(10), 0, at)}"

    def _read(self) -> None:
        open_rules = [_Rule()]
        num_groups, macro_depth = 0, 0
        before = None
        for match in _LEXEME.finditer(self._text):
            rule, sign = open_rules[-1], match["sign"]
            is_called = before is not None and before["name"] and before.end() == match.start()
            if macro_depth or (sign == "(" and is_called and before["name"] not in self._starts):
                macro_depth += (sign == "(") - (sign == ")")  # what the compiler has functions for
            elif match["rule"] is not None:
                open_rules = [self._rules.setdefault(match["rule"], _Rule())]
            elif sign == "(":
                open_rules.append(_Rule())
            elif sign == ")" and len(open_rules) > 1:
                num_groups += 1
                name = f"({num_groups}"  # no name that a rule could have
                self._rules[name] = open_rules.pop()
                open_rules[-1].alternatives[-1].append(_Item(name))
            elif sign == "|":
                rule.alternatives.append([])
            elif (sign or match["least"]) and rule.alternatives[-1]:
                self._repeat(rule, match)
            elif not sign and not match[0].startswith(("#", "{")):
                rule.alternatives[-1].append(_Item(match["name"]))
            before = match

    @staticmethod
    def _repeat(rule: _Rule, match: re.Match[str]) -> None:
        item = rule.alternatives[-1][-1]
        least = match["least"] if match["sign"] is None else "1" if match["sign"] == "+" else "0"
        most = (match["most"] or "2") if match["comma"] else match["least"] or ""
        if match["sign"] is not None:
            most = "1" if match["sign"] == "?" else "2"  # without a bound, and more than once
        item.is_needed = item.is_needed and int(least[:10]) > 0
        item.most = min(MOST, item.most * max(1, int(most[:10])))
        if match["sign"] != "?":
            rule.repeated.append((item, match))

    def _sizes(self) -> dict[str, float]:
        """Elements of each rule when it is spelled out, references within each other once."""
        sizes: dict[str, float] = {}
        for first in self._rules:
            waiting = [first]
            while waiting:
                name = waiting[-1]
                if sizes.setdefault(name, 0.0):
                    waiting.pop()
                    continue
                items = self._rules[name].items
                if inner := {i.name for i in items if i.name in self._rules and i.name not in sizes}:
                    waiting.extend(inner)
                else:
                    sizes[name] = max(1.0, min(MOST, sum(_item_size(item, sizes) for item in items)))
        return sizes


def _item_size(item: _Item, sizes: dict[str, float]) -> float:
    return min(MOST, (sizes.get(item.name or "") or 1.0) * item.most)
