"""What the broad corpus leaves weak, over and over: sums, counting, comparing, forms, calls, lists.

A share of the training documents is drawn from here, in the second phase nearly half.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from engine.demo.dialogue import Document, Turn
from engine.demo.facts import Country, countries
from engine.demo.skills import arithmetic, geography, plain, styles, tools

TurnSource = Callable[[random.Random, bool], list[Turn]]

KNOWN_BEST = ("France", "Japan", "Brazil", "Egypt", "Canada")


def canonical_list_turns(rng: random.Random, held_out: bool) -> list[Turn]:
    """Lists whose members are always the same, so that the likeliest list is a good one."""
    wording, shape = rng.choice(geography.LIST_QUESTIONS)
    count = rng.choice(tuple(geography.COUNT_WORDS))
    continent = rng.choice(countries()).continent
    if shape is None:
        by_name = {c.name: c for c in countries()}
        pool: list[Country] = [by_name[name] for name in KNOWN_BEST]
    else:
        pool = [c for c in countries() if c.continent == continent]
    number = str(count) if rng.random() < 0.5 else geography.COUNT_WORDS[count]
    answer = geography.list_answer(pool[:count], shape)
    return [Turn(wording.format(n=number, p=continent), answer)]


DRILLS: tuple[tuple[TurnSource, int], ...] = (
    (arithmetic.sum_turns, 34),
    (arithmetic.count_turns, 4),
    (arithmetic.compare_turns, 7),
    (geography.check_turns, 2),
    (canonical_list_turns, 4),
)


def _repeated(rng: random.Random, source: TurnSource) -> Document:
    messages = []
    for _ in range(rng.randint(1, 8)):
        messages += [m for turn in source(rng, False) for m in turn.messages()]
    return Document(messages)


def _facts(rng: random.Random) -> list[Turn]:
    return [t for _ in range(rng.randint(1, 5)) for t in geography.fact_turns(rng, False)]


def _table_of_sums(rng: random.Random) -> Document:
    return Document(text="\n".join(plain.sums(rng) for _ in range(3)))


def document(rng: random.Random, short_turns: Callable[[random.Random], list[Turn]]) -> Document:
    """One drill; `short_turns` are asked for in a form."""
    roll = rng.random()
    if roll < 0.2:
        return styles.document(rng, False, _facts, styles.CAPITALS)
    if roll < 0.3:
        return styles.document(rng, False, short_turns)
    if roll < 0.43:
        return _table_of_sums(rng)
    if roll < 0.5:
        return tools.document(rng, False, short_turns)
    sources, weights = zip(*DRILLS, strict=True)
    return _repeated(rng, rng.choices(sources, weights)[0])
