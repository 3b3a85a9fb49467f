"""Word lists of the corpus, read from data/words.toml, and made-up words."""

from __future__ import annotations

import random
import tomllib

from engine.demo.facts import DATA_DIR, countries

_LISTS = tomllib.loads((DATA_DIR / "words.toml").read_text(encoding="utf-8"))

FIRST_NAMES = tuple(_LISTS["first_names"].split())
LAST_NAMES = tuple(_LISTS["last_names"].split())
JOBS = tuple(_LISTS["jobs"].split())
HOBBIES = tuple(_LISTS["hobbies"].split())
COLOURS = tuple(_LISTS["colours"].split())
ANIMALS = tuple(_LISTS["animals"].split())
THINGS = tuple(_LISTS["things"].split())
PLACES = tuple(_LISTS["places"].split())
PRODUCTS = tuple(_LISTS["products"].split())
COMMON_WORDS = tuple(_LISTS["common_words"].split())
BOOKS = tuple(_LISTS["books"])

ONSETS = (
    "b",
    "d",
    "f",
    "g",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "v",
    "z",
    "br",
    "dr",
    "gl",
    "kr",
    "st",
    "tr",
)
VOWELS = ("a", "e", "i", "o", "u", "ai", "ei", "ou")
ENDINGS = ("", "", "n", "r", "l", "s", "m", "x", "nd", "th")


_REAL = {c.name for c in countries()} | {c.capital for c in countries()}


def made_up_word(rng: random.Random) -> str:
    """A word that means nothing, such as "Drolaim": what the model must copy or not know."""
    while True:
        syllables = [rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.choice((1, 2, 2, 3)))]
        word = ("".join(syllables) + rng.choice(ENDINGS)).capitalize()
        if word not in _REAL:
            return word


def person_name(rng: random.Random) -> str:
    return f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"


def phone_number(rng: random.Random) -> str:
    return f"{rng.randint(200, 999)}-{rng.randint(100, 999)}-{rng.randint(0, 9999):04d}"
