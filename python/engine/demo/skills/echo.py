"""Saying what the user asks to hear: words, made-up words and numbers copied letter by letter."""

from __future__ import annotations

import random

from engine.demo.dialogue import Turn, draw
from engine.demo.words import COMMON_WORDS, made_up_word

QUESTIONS = (
    ("Say {x}", 3),
    ("Say: {x}", 1),
    ("Repeat after me: {x}", 2),
    ("Repeat: {x}", 2),
    ("Echo {x}", 1),
    ('Say "{x}"', 2),
    ("Please say {x}", 2),
    ("Please repeat: {x}", 1),
    ("Write {x}", 1),
    ("Copy this: {x}", 1),
)


def _word(rng: random.Random) -> str:
    roll = rng.random()
    if roll < 0.65:
        return rng.choice(COMMON_WORDS)
    return made_up_word(rng) if roll < 0.9 else str(rng.randint(0, 9999))


def turns(rng: random.Random, held_out: bool) -> list[Turn]:
    def propose(rng: random.Random):
        text = " ".join(_word(rng) for _ in range(rng.choice((1, 1, 2, 3, 4, 5, 6, 8, 12))))
        if rng.random() < 0.4:
            text = text[0].upper() + text[1:]
        text += rng.choice(("", "", "!", "."))
        wording = rng.choices([w for w, _ in QUESTIONS], [n for _, n in QUESTIONS])[0]
        return ("echo", text), [Turn(wording.format(x=text), text)]

    return draw(rng, held_out, propose)
