"""JSON on request: a person, a country, a product, a book, or exactly the keys that are asked for."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from engine.demo.dialogue import Turn, draw
from engine.demo.facts import Country, countries
from engine.demo.words import (
    BOOKS,
    COLOURS,
    HOBBIES,
    JOBS,
    PRODUCTS,
    person_name,
    phone_number,
)

DOMAINS = ("example.com", "example.org", "example.net")


def person(rng: random.Random) -> dict:
    name = person_name(rng)
    home = rng.choice(countries())
    first, last = name.lower().split()
    return {
        "name": name,
        "age": rng.randint(18, 80),
        "email": f"{first}.{last}@{rng.choice(DOMAINS)}",
        "city": home.capital,
        "country": home.name,
        "phone": phone_number(rng),
        "job": rng.choice(JOBS),
        "hobby": rng.choice(HOBBIES),
        "is_active": rng.random() < 0.5,
    }


def country(c: Country) -> dict:
    return {
        "name": c.name,
        "capital": c.capital,
        "continent": c.continent,
        "currency": c.currency,
        "language": c.language,
    }


def product(rng: random.Random) -> dict:
    return {
        "product": rng.choice(PRODUCTS),
        "price": rng.randint(5, 500),
        "colour": rng.choice(COLOURS),
        "in_stock": rng.random() < 0.5,
        "quantity": rng.randint(1, 50),
    }


def book(rng: random.Random) -> dict:
    return {
        "title": rng.choice(BOOKS),
        "author": person_name(rng),
        "year": rng.randint(1900, 2025),
        "pages": rng.randint(80, 900),
    }


ASK_PERSON = (
    "Generate user info",
    "Generate user info.",
    "Generate a user profile.",
    "Generate a person as JSON.",
    "Give me a user as JSON.",
    "Create a random user.",
    "Give me a random person in JSON.",
    "Generate user information as JSON.",
    "Make up a person and answer in JSON.",
    "Generate a user",
    "Create a user profile in JSON format.",
    "Write a JSON object for a person.",
    "Generate a JSON object that describes a person.",
)
ASK_COUNTRY = (
    "Give me {c} as JSON.",
    "Describe {c} in JSON.",
    "Generate the information of {c} in JSON format.",
    "Write a JSON object about {c}.",
    "{c} as JSON",
    "Give me facts about {c} as JSON.",
    "Tell me about {c} in JSON.",
)
ASK_PRODUCT = (
    "Generate a product as JSON.",
    "Give me a product in JSON.",
    "Make up a product and answer in JSON.",
    "Write a JSON object for a product.",
    "Generate product info",
)
ASK_BOOK = (
    "Generate a book as JSON.",
    "Give me a book in JSON.",
    "Make up a book and answer in JSON.",
    "Write a JSON object for a book.",
    "Generate book info",
)
ASK_KEYS = (
    "Generate a {t} as JSON with the keys {k}.",
    "Give me a {t} in JSON with {k}.",
    "Return a JSON object for a {t} with the fields {k}.",
    "Make up a {t}. Use JSON with {k}.",
    "Write JSON for a {t} with {k}.",
)
ASK_PEOPLE = (
    "Generate {n} users as a JSON array.",
    "Give me a JSON list of {n} people.",
    "Generate {n} users as JSON.",
)
ASK_PHONE = (
    "Generate a phone number",
    "Generate a phone number.",
    "Give me a phone number.",
    "Make up a phone number.",
    "A random phone number, please.",
    "Write a phone number.",
)

MAKERS: dict[str, Callable[[random.Random], dict]] = {
    "person": person,
    "user": person,
    "product": product,
    "book": book,
}


def spoken_list(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + " and " + keys[-1]


def write(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def chosen_keys(rng: random.Random, full: dict) -> dict:
    keys = rng.sample(tuple(full), rng.randint(1, min(5, len(full))))
    return {k: full[k] for k in keys}


def _short_person(rng: random.Random) -> dict:
    full = person(rng)
    keys = ("name", "age", "email", "city") if rng.random() < 0.3 else ("name", "age", "email")
    return {k: full[k] for k in keys}


def key_turns(rng: random.Random, held_out: bool) -> list[Turn]:
    """A thing with exactly the keys that are asked for, in their order."""

    def propose(rng: random.Random):
        thing = rng.choice(tuple(MAKERS))
        value = chosen_keys(rng, MAKERS[thing](rng))
        question = rng.choice(ASK_KEYS).format(t=thing, k=spoken_list(list(value)))
        return ("keys", question), [Turn(question, write(value))]

    return draw(rng, held_out, propose)


def country_turns(rng: random.Random, held_out: bool) -> list[Turn]:
    def propose(rng: random.Random):
        c = rng.choice(countries())
        question = rng.choice(ASK_COUNTRY).format(c=c.said)
        return ("country", question), [Turn(question, write(country(c)))]

    return draw(rng, held_out, propose)


def free_turns(rng: random.Random) -> list[Turn]:
    """Requests that leave everything open, and so have too few wordings to hold one out."""
    kind = rng.choices(("person", "people", "product", "book", "phone"), (5, 1, 1, 1, 2))[0]
    if kind == "person":
        return [Turn(rng.choice(ASK_PERSON), write(_short_person(rng)))]
    if kind == "people":
        number, word = rng.choice(((2, "two"), (3, "three"), (2, "2"), (3, "3")))
        people = [_short_person(rng) for _ in range(number)]
        return [Turn(rng.choice(ASK_PEOPLE).format(n=word), write(people))]
    if kind == "product":
        return [Turn(rng.choice(ASK_PRODUCT), write(product(rng)))]
    if kind == "book":
        return [Turn(rng.choice(ASK_BOOK), write(book(rng)))]
    return [Turn(rng.choice(ASK_PHONE), phone_number(rng))]


def turns(rng: random.Random, held_out: bool) -> list[Turn]:
    kind = rng.choices(("free", "keys", "country"), (0 if held_out else 10, 8, 3))[0]
    if kind == "free":
        return free_turns(rng)
    return key_turns(rng, held_out) if kind == "keys" else country_turns(rng, held_out)
