"""What the broad corpus leaves weak, over and over: sums, counting, comparing, capital letters, lists.

A share of the training documents is drawn from here, in the second phase nearly half.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from engine.demo.dialogue import Document, Turn
from engine.demo.facts import Country, countries
from engine.demo.skills import arithmetic, geography, plain, styles

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
    (arithmetic.count_turns, 8),
    (arithmetic.compare_turns, 8),
    (geography.check_turns, 8),
    (canonical_list_turns, 4),
)


def _repeated(rng: random.Random, source: TurnSource) -> Document:
    messages = []
    for _ in range(rng.randint(1, 8)):
        messages += [m for turn in source(rng, False) for m in turn.messages()]
    return Document(messages)


def _in_capitals(rng: random.Random) -> Document:
    def facts(rng: random.Random) -> list[Turn]:
        return [t for _ in range(rng.randint(1, 5)) for t in geography.fact_turns(rng, False)]

    while True:
        document = styles.document(rng, False, facts)
        if document.messages[-1]["content"].isupper():
            return document


def _table_of_sums(rng: random.Random) -> Document:
    return Document(text="\n".join(plain.sums(rng) for _ in range(3)))


def document(rng: random.Random) -> Document:
    roll = rng.random()
    if roll < 0.25:
        return _in_capitals(rng)
    if roll < 0.4:
        return _table_of_sums(rng)
    sources, weights = zip(*DRILLS, strict=True)
    return _repeated(rng, rng.choices(sources, weights)[0])
