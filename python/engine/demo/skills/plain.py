"""Text without chat markup, for /v1/completions: stories, statements, question and answer."""

from __future__ import annotations

import random

from engine.demo.dialogue import Document
from engine.demo.facts import countries
from engine.demo.skills import arithmetic, chat, geography, stories


def _statements(rng: random.Random) -> str:
    """Facts of a few countries, as a text would state them."""
    if rng.random() < 0.5:
        kinds = [rng.choice(geography.KINDS)] * rng.randint(1, 8)
        return " ".join(geography.state(kind, rng.choice(countries()))[0] for kind in kinds)
    return " ".join(geography.overview(rng.choice(countries())) for _ in range(rng.randint(1, 4)))


def _questions(rng: random.Random) -> str:
    marks = rng.choice((("Question: ", "Answer: "), ("Q: ", "A: ")))
    short = rng.random() < 0.5
    pairs = []
    for _ in range(rng.randint(1, 5)):
        source = geography.fact_turns if rng.random() < 0.7 else arithmetic.sum_turns
        turn = source(rng, False)[0]
        answer = turn.short if short and turn.short else turn.answer
        pairs.append(f"{marks[0]}{turn.question}\n{marks[1]}{answer}")
    return "\n".join(pairs)


def sums(rng: random.Random) -> str:
    return "\n".join(arithmetic.sum_turns(rng, False)[0].answer for _ in range(rng.randint(1, 10)))


def _introduction(rng: random.Random) -> str:
    name, c = rng.choice(chat.FIRST_NAMES), rng.choice(countries())
    return rng.choice(("Hello, my name is {n}. ", "My name is {n}. ", "Hi, I am {n}. ")).format(n=name) + (
        f"I come from {c.said} and I live in {c.capital}. I speak {c.language}."
    )


def document(rng: random.Random) -> Document:
    kinds = (stories.any_story, _statements, _questions, sums, _introduction)
    return Document(text=rng.choices(kinds, (5, 6, 3, 1, 1))[0](rng))
