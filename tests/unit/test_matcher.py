"""Masks that are worked out ahead, and forced tokens that nobody has to draw."""

from __future__ import annotations

import itertools
import json
import random
from collections import deque

import numpy as np
import pytest

from engine.grammar import matcher_memory
from engine.grammar.matcher import ConstraintMatcher, MatcherBatch
from helpers.grammars import Grammars, bundled_vocabulary
from helpers.scheduling import Harness, greedy, prompt

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "size": {"type": "integer", "maximum": 99}},
    "required": ["name", "size"],
}


@pytest.fixture(scope="module")
def grammars():
    return Grammars(bundled_vocabulary())


def allowed_ids(mask: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_masks_are_those_of_a_matcher_alone(grammars, seed):
    """Matchers that miss steps, change places and come and go see their own masks all the same."""
    grammar, draw = grammars.compile("json_schema", SCHEMA), random.Random(seed)
    batch, vocab_size = MatcherBatch(6, len(grammars.vocabulary.tokens)), len(grammars.vocabulary.tokens)
    histories: dict[ConstraintMatcher, list[int]] = {}
    for _ in range(40):
        while len(histories) < 6:
            histories[ConstraintMatcher(grammar, [grammars.end_id])] = []
        step = draw.sample(list(histories), draw.randint(1, 6))
        rows = [*step, None]
        draw.shuffle(rows)
        rows = rows[:6]
        masks = batch.fill(rows)
        if masks is None:
            continue
        drawn = []
        for matcher, mask in zip(rows, masks, strict=True):
            if matcher is None:
                assert (mask == -1).all()
                drawn.append(0)
                continue
            alone, lonely = ConstraintMatcher(grammar, [grammars.end_id]), MatcherBatch(1, vocab_size)
            for token_id in histories[matcher]:
                lonely.advance([alone], [token_id])
            assert (mask == lonely.fill([alone])[0]).all()
            drawn.append(draw.choice(allowed_ids(mask)))
            histories[matcher].append(drawn[-1])
        batch.advance(rows, drawn)
        histories = {matcher: past for matcher, past in histories.items() if not matcher.is_over}


def test_a_grammar_that_gets_slow_with_the_answer_ends_it(grammars, monkeypatch):
    """Each further x can be parted from the others in more ways."""
    monkeypatch.setattr("engine.grammar.late_matcher.QUICK_S", 0.001)
    monkeypatch.setattr("engine.grammar.late_matcher.MAX_SLOW_S", 0.02)
    matcher = ConstraintMatcher(grammars.compile("regex", "(x+x+)+y"), [grammars.end_id])
    masks, x = MatcherBatch(2, len(grammars.vocabulary.tokens)), grammars.vocabulary.tokens.index(b"x")
    num_tokens = 0
    while not matcher.excess:
        assert x in allowed_ids(masks.fill([matcher])[0])
        masks.advance([matcher], [x])
        num_tokens += 1
        assert num_tokens < 1000
    assert num_tokens > 3
    stopped, free = masks.fill([matcher, None])
    assert not stopped.any() and (free == -1).all()


@pytest.mark.parametrize(("kind", "text"), [("regex", "(a+)+"), ("ebnf", 'root ::= b+\nb ::= "a"+')])
def test_a_grammar_that_takes_more_and_more_memory_ends_the_answer(grammars, kind, text):
    """Each a may begin anew what is repeated, and the library forgets none of the ways; it stays quick."""
    matcher = ConstraintMatcher(grammars.compile(kind, text), [grammars.end_id])
    a, num_tokens, sizes = grammars.vocabulary.tokens.index(b"a"), 0, []
    while not matcher.excess:
        matcher.take(a)
        num_tokens += 1
        assert num_tokens < 10_000
        if num_tokens % 100 == 0:
            sizes.append(matcher_memory.size_of(matcher._library.handle))
    assert "32 MiB of memory" in matcher.excess
    assert 2**24 < max(sizes) < 2**26
    assert sizes == sorted(sizes)


def test_long_json_takes_little_memory(grammars):
    """Of a length that no context holds: far more than an answer's tokens, and below a third of the bound."""
    matcher = ConstraintMatcher(grammars.compile("json_object"), [grammars.end_id])
    items = [{"name": "hello world " * 5, "values": [1, 2.5, None, {"deep": [True]}]}] * 600
    text = json.dumps({"items": items}, separators=(",", ":")).encode()
    for token_id in grammars.vocabulary.canonical(text):
        assert matcher.forced or not matcher.excess
        if matcher.forced:
            assert matcher.forced[0] == token_id
        matcher.take(token_id)
    assert not matcher.excess and len(text) > 60_000
    assert matcher_memory.size_of(matcher._library.handle) < 2**25 / 3


def test_a_long_string_is_not_left_for_its_end(grammars):
    """Or the matching of all of it would hold up one step."""
    matcher = ConstraintMatcher(grammars.compile("json_schema", {"type": "string"}), [grammars.end_id])
    matcher.take(grammars.quote_id)
    word, most, num_late = grammars.vocabulary.tokens.index(b"a"), 0, 0
    for _ in range(2000):
        matcher.take(word)
        num_late += bool(matcher._library.behind)
        most = max(most, len(matcher._library.behind))
    assert num_late > 1900 and most < 300
    matcher.take(grammars.quote_id)
    assert matcher.forced[0] == grammars.end_id


def test_going_back_leaves_no_excess(grammars, monkeypatch):
    """What was only tried is not held against the answer."""
    monkeypatch.setattr("engine.grammar.late_matcher.MAX_BYTES", 2**20)
    matcher = ConstraintMatcher(grammars.compile("regex", "(a+)+"), [grammars.end_id])
    a, before = grammars.vocabulary.tokens.index(b"a"), matcher.state()
    for _ in range(400):
        matcher.take(a)
        if matcher.excess:
            break
    assert matcher.excess
    matcher.go_back(before)
    assert not matcher.excess
    assert a in allowed_ids(MatcherBatch(1, len(grammars.vocabulary.tokens)).fill([matcher])[0])


def test_a_machine_that_stalls_ends_no_answer(grammars, monkeypatch):
    """Every token takes an hour by the clock, and hardly any time of the processor."""
    hours = itertools.count(0, 3600)
    monkeypatch.setattr("engine.grammar.late_matcher.time.perf_counter", lambda: float(next(hours)))
    matcher = ConstraintMatcher(grammars.compile("regex", "[ab]+"), [grammars.end_id])
    a = grammars.vocabulary.tokens.index(b"a")
    for _ in range(100):
        matcher.take(a)
    assert not matcher.excess


def test_what_an_answer_takes_is_bounded_as_a_whole(grammars, monkeypatch):
    """By the sum over its tokens, none of which takes long."""
    ticks = itertools.count()
    monkeypatch.setattr("engine.grammar.late_matcher.time.perf_counter", lambda: next(ticks) * 0.02)
    monkeypatch.setattr("engine.grammar.late_matcher.time.thread_time", lambda: next(ticks) * 0.02)
    matcher = ConstraintMatcher(grammars.compile("regex", "[ab]+"), [grammars.end_id])
    a, num_tokens = grammars.vocabulary.tokens.index(b"a"), 0
    while not matcher.excess:
        matcher.take(a)
        num_tokens += 1
    assert 99 <= num_tokens - 1 <= 101  # 10 ms of each are free; the first is not counted


class ScriptedMatcher:
    """Forces what it is told from the start."""

    is_over, excess = False, ""

    def __init__(self, forced: list[int]) -> None:
        self.forced = deque(forced)


@pytest.mark.parametrize("jump_forward", [False, True])
def test_forced_tokens_are_not_drawn(jump_forward):
    harness = Harness(jump_forward=jump_forward)
    harness.submit(
        "a", prompt(20), greedy(max_tokens=6), make_matcher=lambda stop_ids: ScriptedMatcher([7, 8, 9])
    )
    harness.submit("b", prompt(30, seed=1), greedy(max_tokens=6))
    num_drawn, num_steps = 0, 0
    while harness.scheduler.has_work:
        plan = harness.step()
        num_drawn += len(plan.sampled_rows)
        num_steps += 1
    assert harness.tokens("a")[:3] == [7, 8, 9] and len(harness.tokens("a")) == 6
    assert len(harness.tokens("b")) == 6
    assert num_drawn == 3 + 6
    assert num_steps == 6
    assert harness.answers["a", 0].finish_reason == "length"
