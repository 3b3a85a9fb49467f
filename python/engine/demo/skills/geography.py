"""Facts about countries: asked for directly, the other way round, as a list, or as a follow-up."""

from __future__ import annotations

import random

from engine.demo.dialogue import Turn, draw
from engine.demo.facts import Country, countries

CAPITAL_QUESTIONS = (
    "What is the capital of {c}?",
    "What's the capital of {c}?",
    "Which city is the capital of {c}?",
    "Tell me the capital of {c}.",
    "Capital of {c}?",
    "capital of {c}",
    "Name the capital of {c}.",
    "Do you know the capital of {c}?",
    "Please tell me the capital of {c}.",
    "What is {c}'s capital?",
    "Can you tell me what the capital of {c} is?",
    "I would like to know the capital of {c}.",
    "The capital of {c} is?",
    "{c} capital?",
    "What is the capital city of {c}?",
    "Give me the capital of {c}.",
)
UNSEEN_CAPITAL_QUESTIONS = (
    "Which city is {c}'s capital?",
    "Hi, what is the capital of {c}?",
    "Could you please name the capital city of {c}?",
    "I forgot the capital of {c}. What is it?",
)
QUESTIONS = {
    "capital": CAPITAL_QUESTIONS,
    "continent": (
        "Which continent is {c} in?",
        "On which continent is {c}?",
        "Where is {c}?",
        "What continent does {c} belong to?",
        "Tell me the continent of {c}.",
        "In which part of the world is {c}?",
    ),
    "currency": (
        "What is the currency of {c}?",
        "Which currency is used in {c}?",
        "What money do people use in {c}?",
        "Tell me the currency of {c}.",
        "How do I pay in {c}?",
        "What's {c}'s currency?",
    ),
    "language": (
        "What is the main language of {c}?",
        "Which language is spoken in {c}?",
        "What language do people speak in {c}?",
        "Tell me the main language of {c}.",
        "What do they speak in {c}?",
        "What is the language of {c}?",
    ),
    "neighbour": (
        "Name a neighbour of {c}.",
        "Which country borders {c}?",
        "What country is next to {c}?",
        "Tell me a neighbour of {c}.",
        "Name a country that borders {c}.",
    ),
}
NEXT_COUNTRY = (
    "And of {c}?",
    "And {c}?",
    "What about {c}?",
    "And what about {c}?",
    "And for {c}?",
    "How about {c}?",
)
NEXT_FACT = {
    "capital": ("What is its capital?", "And its capital?", "And the capital?", "Which city is its capital?"),
    "continent": ("Which continent is it in?", "And its continent?", "Where is it?"),
    "currency": (
        "What is its currency?",
        "And its currency?",
        "And the currency?",
        "What money do they use there?",
    ),
    "language": (
        "What is its language?",
        "And its language?",
        "What do they speak there?",
        "And the language?",
    ),
    "neighbour": ("Name a neighbour of it.", "And a neighbour?", "Which country borders it?"),
}
KINDS = tuple(QUESTIONS)
KIND_WEIGHTS = (6, 2, 2, 2, 2)
COUNT_WORDS = {2: "two", 3: "three", 4: "four", 5: "five"}


def state(kind: str, c: Country) -> tuple[str, str | None]:
    """The one sentence that states a fact, and the fact in one word."""
    if kind == "capital":
        return f"The capital of {c.said} is {c.capital}.", c.capital
    if kind == "continent":
        return f"{c.starting} is in {c.continent}.", c.continent
    if kind == "currency":
        return f"The currency of {c.said} is the {c.currency}.", c.currency
    if kind == "language":
        return f"The main language of {c.said} is {c.language}.", c.language
    if not c.neighbour:
        return f"{c.starting} is an island country without land neighbours.", None
    return f"{c.neighbour[0].upper()}{c.neighbour[1:]} is a neighbour of {c.said}.", c.neighbour


def overview(c: Country) -> str:
    return (
        f"{c.starting} is a country in {c.continent}. Its capital is {c.capital}. "
        f"The main language is {c.language} and the currency is the {c.currency}."
    )


def fact_turn(kind: str, wording: str, c: Country) -> Turn:
    question = wording.format(c=c.said)
    answer, short = state(kind, c)
    return Turn(question[0].upper() + question[1:] if wording.startswith("{") else question, answer, short)


def _fact(rng: random.Random, held_out: bool) -> tuple[str, Country, Turn]:
    def propose(rng: random.Random):
        kind = rng.choices(KINDS, KIND_WEIGHTS)[0]
        # The plainest wording is the one people try first: ask it more often, and hold none of it out.
        plain = not held_out and rng.random() < 0.25
        wording = QUESTIONS[kind][0] if plain else rng.choice(QUESTIONS[kind])
        country = rng.choice(countries())
        key = None if plain else ("fact", kind, wording, country.name)
        return key, (kind, country, fact_turn(kind, wording, country))

    return draw(rng, held_out, propose)


def fact_turns(rng: random.Random, held_out: bool) -> list[Turn]:
    return [_fact(rng, held_out)[2]]


def follow_up_turns(rng: random.Random, held_out: bool) -> list[Turn]:
    """A fact, then one to three questions that only make sense after it."""

    def propose(rng: random.Random):
        kind, country, first = _fact(rng, False)
        turns, path = [first], []
        for _ in range(rng.choice((1, 1, 2, 3))):
            if rng.random() < 0.6:
                country = rng.choice(countries())
                wording = rng.choice(NEXT_COUNTRY)
            else:
                kind = rng.choice([k for k in KINDS if k != kind])
                wording = rng.choice(NEXT_FACT[kind])
            turns.append(Turn(wording.format(c=country.said), *state(kind, country)))
            path.append((kind, country.name, wording))
        return ("follow", first.question, path), turns

    return draw(rng, held_out, propose)


REVERSE_QUESTIONS = (
    "{x} is the capital of which country?",
    "Which country has the capital {x}?",
    "Of which country is {x} the capital?",
    "What country is {x} the capital of?",
    "Where is {x}?",
)


def reverse_turns(rng: random.Random, held_out: bool) -> list[Turn]:
    def propose(rng: random.Random):
        c, wording = rng.choice(countries()), rng.choice(REVERSE_QUESTIONS)
        if c.capital == c.name:
            wording = REVERSE_QUESTIONS[0]
        turn = Turn(wording.format(x=c.capital), f"{c.capital} is the capital of {c.said}.", c.said)
        return ("reverse", wording, c.name), [turn]

    return draw(rng, held_out, propose)


def check_turns(rng: random.Random, held_out: bool) -> list[Turn]:
    """Whether a city is the capital: answered by the fact. Models as small as this one guess a yes or no."""

    def propose(rng: random.Random):
        c = rng.choice(countries())
        city = c.capital if rng.random() < 0.5 else rng.choice(countries()).capital
        question = rng.choice(("Is {x} the capital of {c}?", "Is the capital of {c} {x}?")).format(
            x=city, c=c.said
        )
        return ("check", question), [Turn(question, *state("capital", c))]

    return draw(rng, held_out, propose)


OVERVIEW_QUESTIONS = (
    "Tell me about {c}.",
    "What do you know about {c}?",
    "Describe {c}.",
    "What is {c}?",
    "Tell me something about {c}.",
    "Give me some facts about {c}.",
    "Please introduce {c}.",
    "{c}",
)


def overview_turns(rng: random.Random, held_out: bool) -> list[Turn]:
    def propose(rng: random.Random):
        c, wording = rng.choice(countries()), rng.choice(OVERVIEW_QUESTIONS)
        return ("overview", wording, c.name), [Turn(wording.format(c=c.said), overview(c))]

    return draw(rng, held_out, propose)


LIST_QUESTIONS = (
    ("List {n} countries and their capitals.", None),
    ("Name {n} countries and their capitals.", None),
    ("List {n} countries in {p} and their capitals.", "both"),
    ("List {n} countries in {p}.", "names"),
    ("Name {n} countries in {p}.", "names"),
    ("Give me {n} countries in {p}.", "names"),
)


def list_answer(chosen: list[Country], shape: str | None) -> str:
    """A numbered list of countries, with their capitals unless `shape` is "names"."""
    lines = [c.starting if shape == "names" else f"{c.starting}: {c.capital}" for c in chosen]
    return "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1))


def list_turns(rng: random.Random, held_out: bool) -> list[Turn]:
    def propose(rng: random.Random):
        wording, shape = rng.choice(LIST_QUESTIONS)
        count = rng.choice(tuple(COUNT_WORDS))
        continent = rng.choice(countries()).continent
        pool = [c for c in countries() if shape is None or c.continent == continent]
        chosen = rng.sample(pool, count)
        number = str(count) if rng.random() < 0.5 else COUNT_WORDS[count]
        question = wording.format(n=number, p=continent)
        return ("list", question), [Turn(question, list_answer(chosen, shape))]

    return draw(rng, held_out, propose)


VARIANTS = (fact_turns, follow_up_turns, reverse_turns, check_turns, overview_turns, list_turns)


def turns(rng: random.Random, held_out: bool) -> list[Turn]:
    return rng.choices(VARIANTS, (60, 18, 8, 5, 5, 4))[0](rng, held_out)
