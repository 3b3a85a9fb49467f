"""Answers that go where others have been: the same masks and forced tokens, without the library's matcher."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from engine.grammar.known_paths import MAX_NEW, KnownPaths
from engine.grammar.matcher import ConstraintMatcher
from engine.grammar.vocabulary import VocabularyData
from helpers.grammars import Grammars, bundled_vocabulary

CALLS = ("accept_token", "accept_string", "find_jump_forward_string", "fill_next_token_bitmask")
TEXT = {"type": "string"}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 3, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["new", "newer", "old"]}, "maxItems": 3},
        "notes": {"type": "array", "items": TEXT, "maxItems": 2},
        "code": {"type": "string", "pattern": "^[a-c]{2}-[0-9]+$"},
    },
    "required": ["name", "age", "tags"],
}
EITHER = {
    "anyOf": [
        {"type": "string", "maxLength": 6},
        {"type": "string", "pattern": "^ab*$"},
        {"type": "object", "properties": {"a": {"type": "string", "minLength": 2}}, "required": ["a"]},
        {"type": "object", "properties": {"a": {"type": "string", "maxLength": 3}, "b": {"type": "null"}}},
    ]
}
LISTS = {"$defs": {"l": {"type": "array", "items": {"$ref": "#/$defs/l"}}}, "$ref": "#/$defs/l"}
CALL = {"type": "json_schema", "json_schema": PERSON}
GRAMMARS: dict[str, tuple[str, Any]] = {
    "person": ("json_schema", PERSON),
    "either": ("json_schema", EITHER),
    "any object": ("json_object", ""),
    "list of lists": ("json_schema", LISTS),
    "phone": ("regex", r"\([0-9]{3}\) [0-9]{3}-[0-9]{4}( ext)?"),
    "words": ("regex", r"((ab|abc|é|日本)+ )*end"),
    "choice": ("choice", ["yes", "yesterday", "no", "nobody knows"]),
    "sums": ("ebnf", 'root ::= term ("+" term)*\nterm ::= [0-9] | "(" root ")"'),
    "calls": (
        "structural_tag",
        {
            "type": "structural_tag",
            "format": {
                "type": "triggered_tags",
                "triggers": ["<f="],
                "at_least_one": True,
                "tags": [
                    {"type": "tag", "begin": f"<f={name}>", "content": CALL, "end": "</f>"}
                    for name in ("get", "put")
                ],
            },
        },
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(bundled_vocabulary())


def allowed_ids(mask: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


class Counting:
    """The library's bindings; counts what its matchers are asked."""

    def __init__(self, bindings: Any) -> None:
        self._bindings, self.num_calls = bindings, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bindings, name)

    def GrammarMatcher(self, *args: Any) -> Any:
        return CountingMatcher(self, self._bindings.GrammarMatcher(*args))


class CountingMatcher:
    def __init__(self, library: Counting, matcher: Any) -> None:
        self._library, self._matcher = library, matcher

    def __getattr__(self, name: str) -> Any:
        self._library.num_calls += name in CALLS
        return getattr(self._matcher, name)


def likely(tokens: list[bytes], ids: list[int], draw: random.Random) -> int:
    """Mostly one of few tokens, so that answers meet."""
    if draw.random() < 0.1:
        return draw.choice(ids)
    few = [i for i in ids if len(tokens[i]) <= 2 and (tokens[i][:1] in b'"ab,:]}<f=1)+\xe6' or not tokens[i])]
    return draw.choice(few or ids)


def alone_in(grammar: Any, stop_ids: list[int]) -> ConstraintMatcher:
    """A matcher that knows of no other."""
    paths, grammar.paths = grammar.paths, KnownPaths()
    matcher = ConstraintMatcher(grammar, stop_ids)
    grammar.paths = paths
    return matcher


def answer(grammars: Grammars, grammar: Any, seed: int, stop_ids: list[int]) -> Iterator[ConstraintMatcher]:
    """Follow an answer drawn by chance beside one that has never been anywhere, with guesses in between."""
    draw, tokens = random.Random(seed), grammars.vocabulary.tokens
    known, alone = ConstraintMatcher(grammar, stop_ids), alone_in(grammar, stop_ids)
    row, other = np.empty((2, -(-len(tokens) // 32)), np.int32)
    for _ in range(60):
        assert known.forced == alone.forced and known.is_over == alone.is_over
        if known.is_over:
            break
        mask = known.mask(row).copy()
        assert (mask == alone.mask(other)).all()
        ids = allowed_ids(mask)
        assert ids
        before = known.state()
        for _ in range(draw.choice([0, 0, 0, 1, 3])):
            known.take(likely(tokens, allowed_ids(known.mask(row)), draw))
            if known.is_over:
                break
        known.go_back(before)
        token_id = likely(tokens, ids, draw)
        known.take(token_id)
        alone.take(token_id)
        yield known


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("name", GRAMMARS)
def test_answers_that_meet_see_what_each_sees_alone(grammars, name, counts, monkeypatch):
    grammar = grammars.compile(*GRAMMARS[name], counts=counts)
    monkeypatch.setattr(grammar, "paths", KnownPaths())
    num_known = 0
    for seed in range(12):
        stop_ids = [grammars.end_id] if seed % 3 else []
        for matcher in answer(grammars, grammar, seed, stop_ids):
            num_known += bool(matcher._library.behind)
    assert num_known > 0


def test_a_token_is_not_always_its_text(grammars, monkeypatch):
    """A grammar in GBNF may name tokens by their ids."""
    tokens = grammars.vocabulary.tokens
    an = tokens.index(b"an")
    text = f'root ::= Token({an}) [ab]{{3}} | "an" [cd] | ExcludeToken({an}) "." [ab]{{2}}'
    grammar = grammars.compile("ebnf", text)
    monkeypatch.setattr(grammar, "paths", KnownPaths())
    for seed in range(15):
        for _ in answer(grammars, grammar, seed, [grammars.end_id]):
            pass


@pytest.mark.parametrize("name", GRAMMARS)
def test_whoever_comes_third_asks_nobody(grammars, name, monkeypatch):
    grammar = grammars.compile(*GRAMMARS[name])
    monkeypatch.setattr(grammar, "paths", KnownPaths())
    monkeypatch.setattr(grammar, "bindings", Counting(grammar.bindings))
    asked, tokens = [], grammars.vocabulary.tokens
    for _ in range(3):
        before = grammar.bindings.num_calls
        draw, matcher = random.Random(4), ConstraintMatcher(grammar, [grammars.end_id])
        row = np.empty(-(-len(grammars.vocabulary.tokens) // 32), np.int32)
        for _ in range(20):
            if matcher.is_over:
                break
            whole = [
                i for i in allowed_ids(matcher.mask(row)) if tokens[i].isascii() and b"\\" not in tokens[i]
            ]
            matcher.take(likely(tokens, whole, draw))
        asked.append(grammar.bindings.num_calls - before)
    assert min(asked[:2]) > 2 and asked[2] == 0


def test_strings_are_one_place_whatever_is_in_them(grammars, monkeypatch):
    """Behind three names of other lengths and letters nothing about what follows is new."""
    grammar = grammars.compile("json_schema", PERSON)
    monkeypatch.setattr(grammar, "paths", KnownPaths())
    monkeypatch.setattr(grammar, "bindings", Counting(grammar.bindings))
    row = np.empty(-(-len(grammars.vocabulary.tokens) // 32), np.int32)
    for name in ("abc", "ddddd", "eeee", "zzzzzz"):
        matcher = ConstraintMatcher(grammar, [grammars.end_id])
        text = b'{"name":"' + name.encode()
        for token_id in grammars.vocabulary.canonical(text):
            matcher.take(token_id)
        before = grammar.bindings.num_calls
        for byte in b'"1':
            while matcher.forced:
                matcher.take(matcher.forced[0])
            matcher.take(grammars.vocabulary.tokens.index(bytes([byte])))
            matcher.mask(row)
        asked = grammar.bindings.num_calls - before
    assert asked == 0


def follow_small(monkeypatch, words: list[bytes], schemas: list[dict], counts: bool, answers: list) -> None:
    """Answers one after the other, in a vocabulary of few words, each beside one that knows of no other."""
    order = np.array(sorted(range(len(words)), key=words.__getitem__), "<i4")
    small = Grammars(VocabularyData([*words, b""], order.tobytes(), len(words)))
    grammar = small.compile("json_schema", {"anyOf": schemas}, counts=counts)
    monkeypatch.setattr(grammar, "paths", KnownPaths())
    rows = np.empty((2, 1), np.int32)
    for answer in answers:
        both = ConstraintMatcher(grammar, [small.end_id]), alone_in(grammar, [small.end_id])
        for word in answer:
            masks = [matcher.mask(row) for matcher, row in zip(both, rows, strict=True)]
            known_ids, ids = ([i for i in allowed_ids(mask) if i <= len(words)] for mask in masks)
            assert known_ids == ids
            for matcher in both:
                matcher.take(words.index(word))


def test_a_string_that_only_some_answers_know_to_be_one(monkeypatch):
    """Who has looked while it might match the pattern, too, does not look again; who came within a character
    has not looked before."""
    words = [bytes([byte]) for byte in b'"abe\xc3\xa8'] + [b'"a\xc3']
    schemas = [{"type": "string", "maxLength": 5}, {"type": "string", "pattern": "^aa*$"}]
    whole, cut, more = (b'"a\xc3', b"\xa8"), (b'"', b"a", b"\xc3", b"\xa8"), (b"b",) * 3
    answers = [whole + more, *[cut + more] * 4, (b'"', *more, b"b", b"b")]
    follow_small(monkeypatch, words, schemas, False, answers)


def test_a_string_that_is_forced_at_the_start(monkeypatch):
    """And is known only later for the one that it is."""
    words, schemas = [b'"', b"a", b"e"], [{"type": "string", "maxLength": most} for most in (2, 9)]
    follow_small(monkeypatch, words, schemas, True, [(b'"', *[b"a"] * 8)] * 4)


def test_what_is_kept_is_bounded(grammars, monkeypatch):
    """Answers that are on their way go on, when all is forgotten under them."""
    grammar, store = grammars.compile("json_schema", PERSON), KnownPaths(2**18)
    monkeypatch.setattr(grammar, "paths", store)
    first = weakref.ref(store.of(grammar, (grammars.end_id,)))
    waits = ConstraintMatcher(grammar, [grammars.end_id])
    under_way = [answer(grammars, grammar, seed, [grammars.end_id]) for seed in range(60)]
    while under_way:
        under_way = [each for each in under_way if next(each, None) is not None]
        assert store._num_bytes <= 2**18
    assert waits._paths is first() is not store.of(grammar, (grammars.end_id,))
    assert not waits._waypoint.passages, "an answer that has not gone on keeps what is forgotten"
    del waits
    gc.collect()
    assert first() is None


def test_a_forgotten_place_is_taken_for_no_other(grammars):
    paths = KnownPaths().of(grammars.compile("regex", "a*"), ())
    before = paths.waypoint(0, b"a", None)
    paths.forget()
    assert paths.waypoint(0, b"b", None).number != before.number


def test_what_nobody_repeats_is_not_kept(grammars, monkeypatch):
    grammar = grammars.compile("regex", "[a-z ]*")
    monkeypatch.setattr(grammar, "paths", KnownPaths())
    matcher, draw = ConstraintMatcher(grammar, [grammars.end_id]), random.Random(0)
    row = np.empty(-(-len(grammars.vocabulary.tokens) // 32), np.int32)
    for _ in range(300):
        matcher.take(draw.choice([i for i in allowed_ids(matcher.mask(row)) if i != grammars.end_id]))
    waypoint, num_passages = grammar.paths.of(grammar, (grammars.end_id,)).start, 0
    while waypoint.passages:
        (passage,) = waypoint.passages.values()
        assert passage.situation is None
        waypoint, num_passages = passage.to, num_passages + 1
    assert num_passages == MAX_NEW
