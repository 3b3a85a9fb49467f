"""Small sums: addition and subtraction up to two digits, tables up to twelve, comparing, counting."""

from __future__ import annotations

import random

from engine.demo.dialogue import Turn, draw

QUESTIONS = (
    "What is {e}?",
    "{e}",
    "{e} = ?",
    "{e}=",
    "Calculate {e}.",
    "How much is {e}?",
    "Compute {e}",
    "Please calculate {e}.",
    "What's {e}?",
    "Can you work out {e}?",
)
COUNT_WORDINGS = (
    "Count from 1 to {n}.",
    "Count from 1 to {n}",
    "Please count from 1 to {n}.",
    "Count to {n}.",
    "Count to {n}",
    "Please count to {n}.",
    "Can you count to {n}?",
)
SIGNS = {
    "+": ("+", "+", "plus"),
    "-": ("-", "-", "minus"),
    "*": ("*", "x", "times"),
    "/": ("/", "divided by"),
}


def result(a: int, sign: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else 0}[sign]


def _operands(rng: random.Random, sign: str) -> tuple[int, int]:
    if sign == "*":
        return rng.randint(0, 12), rng.randint(0, 12)
    if sign == "/":
        b, quotient = rng.randint(1, 12), rng.randint(0, 12)
        return b * quotient, b
    top = 20 if rng.random() < 0.4 else 99
    a, b = rng.randint(0, top), rng.randint(0, top)
    return (max(a, b), min(a, b)) if sign == "-" else (a, b)


def sum_key(a: int, sign: str, b: int) -> tuple | None:
    """By which a sum is held out: by its operands, in either order, however it is asked.

    The tables, and what is as small, are to be known whole.
    """
    if sign in "*/" or max(a, b) <= 12:
        return None
    return ("sum", *(sorted((a, b)) if sign == "+" else (a, b)), sign)


def sum_turns(rng: random.Random, held_out: bool) -> list[Turn]:
    def propose(rng: random.Random):
        sign = rng.choices(tuple(SIGNS), (4, 3, 2, 1))[0]
        a, b = _operands(rng, sign)
        spoken = rng.choice(SIGNS[sign])
        tight = spoken in "+-*/" and rng.random() < 0.3
        expression = f"{a}{spoken}{b}" if tight else f"{a} {spoken} {b}"
        value = str(result(a, sign, b))
        question = rng.choice(QUESTIONS).format(e=expression)
        return sum_key(a, sign, b), [Turn(question, f"{a} {sign} {b} = {value}", value)]

    return draw(rng, held_out, propose)


def compare_turns(rng: random.Random, held_out: bool) -> list[Turn]:
    def propose(rng: random.Random):
        a, b = rng.sample(range(100), 2)
        word, chosen = rng.choice((("larger", max(a, b)), ("smaller", min(a, b))))
        other = a + b - chosen
        question = rng.choice(("Which is {w}, {a} or {b}?", "Which number is {w}: {a} or {b}?")).format(
            w=word, a=a, b=b
        )
        return ("compare", a, b), [Turn(question, f"{chosen} is {word} than {other}.", str(chosen))]

    return draw(rng, held_out, propose)


def count_turns(rng: random.Random, held_out: bool) -> list[Turn]:
    def propose(rng: random.Random):
        last, wording = rng.randint(3, 20), rng.choice(COUNT_WORDINGS)
        answer = ", ".join(str(i) for i in range(1, last + 1))
        return ("count", wording, last), [Turn(wording.format(n=last), answer)]

    return draw(rng, held_out, propose)


def turns(rng: random.Random, held_out: bool) -> list[Turn]:
    return rng.choices((sum_turns, compare_turns, count_turns), (8, 1, 1))[0](rng, held_out)
