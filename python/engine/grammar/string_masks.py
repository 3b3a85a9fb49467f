"""Masks within JSON strings, put together from tables of the vocabulary.

What may come within a string is known beforehand: every token of plain characters that are few enough, and
few others, which close the string. These are the same wherever it is long enough and not yet too long. So
while a string goes on by plain characters, nobody has to ask xgrammar, nor tell it.

Where xgrammar counts the characters of a string while it matches, that is needed: where a token could be
longer than what is left of the string it tries every token of the vocabulary, 7 ms for a mask of 151,936
tokens, 40 ms at the end of a string. What closes such a string is asked of the matcher once. Wherever an
answer may be anything but inside of one such string, xgrammar fills the mask.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from engine.grammar.vocabulary import allows

QUOTE, ESCAPE = b'"', b"\\"
RULE = "string_of_"
"""What the names of rules for bounded strings begin with. A rule begins behind the opening quote, and ends
with the closing one; it alone has a temperature, by which the matcher tells which rule it is in."""

ANY_STRING = "basic_string_sub"
"""The compiler's own rule for all others, in which there may be escapes. It gets a temperature, too."""

JSON_CHARACTER = r"[\x20\x21\x23-\x5b\x5d-\ud7ff\ue000-\U0010ffff]"
_RULES = re.compile(r"^([\w.-]+)(?:\[[^\]]*\])? ::= ", re.MULTILINE)
_COUNTED = "_counted"
_BOUNDS = re.compile(rf"{RULE}(\d+)_(\d+)({_COUNTED})?$|{ANY_STRING}(?:_\d+)?$")
_ACTIVE = re.compile(r"active_temperature_rule_id=(\d+)")
_STATE = "ParserState("
_CONTINUATIONS = tuple(bytes([byte]) for byte in (0x80, 0xA0))
"""Behind any beginning of a character one of them can follow. Source: RFC 3629, section 4."""

LONG_ENOUGH = "long enough"
"""Key of all places in a string at which it may be closed, and go on with any token of plain characters."""

_MASKS_KEPT = 256
_NO_BOUND = 2**62


class Bounds(NamedTuple):
    """Least and most characters of a string, and whether xgrammar counts them while it matches."""

    least: int
    most: int
    is_counted: bool


def rule_name(least: int, most: int, is_counted: bool) -> str:
    return f"{RULE}{least}_{most}{_COUNTED if is_counted else ''}"


BoundsOfRules = dict[int, Bounds]
"""By the number of a rule for strings."""


def bounds_of(handle: Any) -> BoundsOfRules:
    """The rules for strings of a compiled grammar."""
    names = _RULES.findall(handle.grammar().to_string())
    found = ((number, _BOUNDS.search(name)) for number, name in enumerate(names))
    return {
        number: Bounds(int(match[1] or 0), int(match[2] or _NO_BOUND), bool(match[3]))
        for number, match in found
        if match
    }


class StringTables:
    """What a vocabulary has for the inside of JSON strings. Shared by all grammars; not by threads.

    Cost: 40 ms for 150,000 tokens; 256 masks of that size take 5 MB.
    """

    def __init__(self, bindings: Any, compiler: Any, tokens: list[bytes]) -> None:
        text = np.frombuffer(b"".join(tokens) + QUOTE, np.uint8)
        ends = np.cumsum([len(token) for token in tokens])
        starts = np.concatenate([[0], ends[:-1]])
        num_before = np.concatenate([[0], np.cumsum((text & 0xC0) != 0x80)])  # characters begun before a byte
        quotes = np.flatnonzero(text == ord(QUOTE))
        quote_at = quotes[np.searchsorted(quotes, starts)]
        num_chars = num_before[np.minimum(quote_at, ends)] - num_before[starts]
        self._num_words = -(-len(tokens) // 32)
        self._num_chars = num_chars
        self.most_chars = int(num_chars.max())
        """Of a token, before its first quote."""
        self._no_longer_than: dict[int, np.ndarray] = {}
        self._plain: dict[bytes, np.ndarray] = {}
        grammar = compiler.compile_grammar_from_strings(f"root ::= {JSON_CHARACTER}*", "root")
        self._stop_id = tokens.index(b"")
        self._matcher = bindings.GrammarMatcher(grammar, [self._stop_id], False, -1, None)
        # Tokens that close a string: what they begin with, and from the quote on.
        self._closing = np.flatnonzero((quote_at < ends) & (ends > starts))
        self._heads = [tokens[i].partition(QUOTE)[0] for i in self._closing]
        self._tails = _Tree()
        for place, token_id in enumerate(self._closing):
            self._tails.add(tokens[token_id][len(self._heads[place]) :], place)
        self.most_before_quote = int(num_chars[self._closing].max(initial=0))
        """Characters that a token has before its first quote, if it has one."""
        is_plain = np.unpackbits(self.plain(b"").view(np.uint8), count=len(tokens), bitorder="little").astype(
            bool
        )
        is_plain &= num_chars < 256
        ends_early = [
            i for i in np.flatnonzero(is_plain & (text[ends - 1] >= 0x80)) if begun_character(tokens[i])
        ]
        is_plain[ends_early] = False
        self.plain_chars = np.where(is_plain, num_chars, 0).astype(np.uint8).tobytes()
        """Of each token: how many characters it is; 0 if it is anything but whole plain ones, or over 255."""
        self._byte_ids = {token: i for i, token in enumerate(tokens) if len(token) == 1}
        self._closing_plainly = {place for place, head in enumerate(self._heads) if self._is_text(b"", head)}
        self.closing_tails = {
            int(self._closing[place]): tokens[self._closing[place]][len(self._heads[place]) :]
            for place in self._closing_plainly
        }
        """Of the tokens that close a string behind nothing but whole plain characters: from the quote on."""

    def no_longer_than(self, num_chars: int) -> np.ndarray:
        """Bitmask of the tokens that begin at most so many characters before their first quote."""
        num_chars = min(num_chars, self.most_chars)
        mask = self._no_longer_than.get(num_chars)
        if mask is None:
            mask = self._no_longer_than[num_chars] = self._packed(self._num_chars <= num_chars)
        return mask

    def plain(self, pending: bytes) -> np.ndarray:
        """Bitmask of the tokens that stay within a string, behind the beginning of a character."""
        mask = self._plain.get(pending)
        if mask is None:
            if len(self._plain) == _MASKS_KEPT:
                self._plain.clear()
            mask = self._plain[pending] = np.empty(self._num_words, np.int32)
            assert not pending or self._matcher.accept_string(pending, False)
            self._matcher.fill_next_token_bitmask(mask, 0, False)
            self._matcher.rollback(bool(pending))
            mask.view(np.uint32)[self._stop_id >> 5] &= np.uint32(0xFFFFFFFF ^ (1 << (self._stop_id & 31)))
        return mask

    def closing(self, handle: Any, pending: bytes, num_missing: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the tokens that may close the string in which a matcher is, and the characters that each
        puts before the quote. `num_missing` are the characters that have to come first."""
        trial = handle.fork()
        begun = pending
        while begun:
            byte = next(byte for byte in _CONTINUATIONS if trial.accept_string(byte, False))
            begun = begun_character(begun + byte)
        if num_missing:
            assert trial.accept_string(b"a" * num_missing, False)
        is_right = self._is_text_behind(pending) if pending else self._closing_plainly.__contains__
        places = np.array(list(filter(is_right, self._tails.accepted(trial, self._may_follow))), np.intp)
        ids = self._closing[places]
        return ids, self._num_chars[ids]

    def _is_text_behind(self, pending: bytes) -> Any:
        return lambda place: self._is_text(pending, self._heads[place])

    def _is_text(self, pending: bytes, head: bytes) -> bool:
        """Whether both together are whole plain characters."""
        matcher = self._matcher
        if not pending + head:
            return True
        if not matcher.accept_string(pending + head, False):
            return False
        is_whole = matcher.is_completed()
        matcher.rollback(1)
        return bool(is_whole)

    def _may_follow(self, handle: Any, candidates: Iterable[bytes]) -> Iterable[bytes]:
        """Those bytes that a matcher takes, or takes perhaps."""
        mask = np.empty(self._num_words, np.int32)
        handle.fill_next_token_bitmask(mask, 0, False)
        ids = self._byte_ids
        return [b for b in candidates if b not in ids or allows(mask, np.array([ids[b]]))]

    def _packed(self, flags: np.ndarray) -> np.ndarray:
        padded = np.zeros(self._num_words * 32, bool)
        padded[: len(flags)] = flags
        return np.packbits(padded, bitorder="little").view(np.int32)


class StringPlace:
    """Where an answer is within a string, if it is in one."""

    __slots__ = (
        "_bounds",
        "_closing",
        "_counts",
        "_has_escape",
        "_has_looked",
        "_num_chars",
        "_pending",
        "_tables",
        "_whole",
        "here",
    )

    def __init__(self, tables: StringTables, bounds: BoundsOfRules) -> None:
        self._tables, self._bounds = tables, bounds
        self._counts = any(each.is_counted for each in bounds.values())
        self._num_chars, self._pending = 0, b""
        """Behind the last quote."""
        self._forget()

    def _forget(self) -> None:
        self.here: Bounds | None = None
        """The string that the answer is in, if it is one of a rule for strings."""
        self._has_looked = self._has_escape = False
        self._closing: tuple[np.ndarray, np.ndarray] | None = None
        self._whole: np.ndarray | None = None
        """A bitmask of this string, from where it was long enough. Further on the same tokens may follow,
        as far as they are not too long."""

    def saw(self, text: bytes) -> None:
        """The answer goes on with these bytes."""
        quote = text.rfind(QUOTE)
        if quote >= 0:
            self._num_chars, self._pending = 0, b""
            self._forget()
            text = text[quote + 1 :]
        if ESCAPE in text:  # what follows may be more of it
            self._forget()
            self._has_escape = True
        self._num_chars += sum(byte & 0xC0 != 0x80 for byte in text)
        self._pending = b"" if text.isascii() and text else begun_character(self._pending + text)

    def goes_on(self, token_id: int) -> bool:
        """Whether the answer stays within the string with this token, and may still end in more than one
        way. `mask` tells what may follow then, without the matcher."""
        num_new, here = self._tables.plain_chars[token_id], self.here
        if not num_new or here is None or self._pending:
            return False
        num_chars = self._num_chars + num_new
        if num_chars >= here.most or not self._is_known(here.least - num_chars):
            return False
        self._num_chars = num_chars
        return True

    def key(self, token_id: int) -> Hashable | None:
        """Tells, together with the place where the answer came into this string, where it is behind a token:
        how many characters it has, or what closes it. Outside of strings, the token itself. None if that is
        not all there is to it."""
        if self.here is None:
            return token_id
        if self._pending:
            return None
        num_new = self._tables.plain_chars[token_id]
        if not num_new:
            return self._tables.closing_tails.get(token_id)
        num_chars = self._num_chars + num_new
        is_in_between = self.here.least <= num_chars <= self.here.most - self._tables.most_chars
        return LONG_ENOUGH if is_in_between else ~num_chars

    def follow(self, token_id: int, state: tuple) -> None:
        """Go on to where another answer to the key `LONG_ENOUGH` had this state."""
        num_chars = self._num_chars + self._tables.plain_chars[token_id]
        self.go_back(state)
        self._num_chars = num_chars

    @property
    def is_known(self) -> bool:
        """Whether the tables tell the mask, so that `mask` asks no matcher."""
        here = self.here
        return here is not None and not self._pending and self._is_known(here.least - self._num_chars)

    def _is_known(self, num_missing: int) -> bool:
        """Whether the tables tell the mask where so many characters have to come before the quote."""
        return self._whole is not None or num_missing > self._tables.most_before_quote

    def mask(self, handle: Any, out: np.ndarray) -> np.ndarray | None:
        """The bitmask of the next token, int32 [ceil(V / 32)], if the tables tell it: `out`, or one that
        must not be written to."""
        if self.here is None and self._counts and not self._has_escape:
            self.here = self._look(handle)
        here, tables, pending = self.here, self._tables, self._pending
        if here is None:
            return None
        num_left, num_missing = here.most - self._num_chars, max(0, here.least - self._num_chars)
        if not pending and self._is_known(num_missing):
            some = tables.plain(b"") if self._whole is None else self._whole
            return some if num_left >= tables.most_chars else some & tables.no_longer_than(num_left)
        if not here.is_counted:
            return None
        closing = None if pending else self._closing
        if closing is None:
            closing = tables.closing(handle, pending, num_missing)
            if not pending:
                self._closing = closing
        np.bitwise_and(tables.plain(pending), tables.no_longer_than(num_left), out=out)
        ids, num_chars = closing
        ids = ids[(num_chars >= num_missing) & (num_chars <= num_left)]
        bits = np.left_shift(1, ids & 31, dtype=np.uint32, casting="unsafe")
        np.bitwise_or.at(out.view(np.uint32), ids >> 5, bits)
        return out

    def learn(self, handle: Any, mask: np.ndarray) -> None:
        """Remember the mask of this place for the rest of the string, if the answer is in one. `mask` must
        allow more than one way to go on."""
        if not self._has_looked and not self._has_escape:
            self._has_looked = True
            self.here = self.here or self._look(handle)
        here = self.here
        if here is not None and self._whole is None and not self._pending and self._num_chars >= here.least:
            self._whole = mask.copy()

    def _look(self, handle: Any) -> Bounds | None:
        return self._bounds.get(_only_rule(handle._debug_print_internal_state()))

    def state(self) -> tuple:
        looked = self._has_looked, self._has_escape
        return self._num_chars, self._pending, self.here, looked, self._closing, self._whole

    def go_back(self, state: tuple) -> None:
        self._num_chars, self._pending, self.here, looked, self._closing, self._whole = state
        self._has_looked, self._has_escape = looked


class _Tree:
    """Byte strings by what they begin with."""

    def __init__(self) -> None:
        self.places: list[int] = []
        self.children: dict[bytes, _Tree] = {}

    def add(self, text: bytes, place: int) -> None:
        node = self
        for byte in text:
            node = node.children.setdefault(bytes([byte]), _Tree())
        node.places.append(place)

    def accepted(self, handle: Any, may_follow: Any, depth: int = 0) -> Iterator[int]:
        """Places of the strings that a matcher accepts. All begin with a quote, and what `may_follow` it is
        asked for at once: many could, and few do."""
        yield from self.places
        children = self.children
        for byte in may_follow(handle, children) if depth == 1 else children:
            if handle.accept_string(byte, False):
                yield from children[byte].accepted(handle, may_follow, depth + 1)
                handle.rollback(1)


def begun_character(text: bytes) -> bytes:
    """The bytes at the end of a text in UTF-8 that begin a character without finishing it."""
    for length in range(1, min(3, len(text)) + 1):
        byte = text[-length]
        if byte >= 0xC0:
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return text[-length:] if length < needed else b""
        if byte < 0x80:
            return b""
    return b""


def _only_rule(states: str) -> int:
    """The rule with a temperature that all states are in; -1 if there is none."""
    rules = _ACTIVE.findall(states)
    return int(rules[0]) if len(rules) == states.count(_STATE) and len(set(rules)) == 1 else -1
