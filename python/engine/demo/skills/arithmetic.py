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


def sum_turns(rng: random.Random, held_out: bool) -> list[Turn]:
    def propose(rng: random.Random):
        sign = rng.choices(tuple(SIGNS), (4, 3, 2, 1))[0]
        a, b = _operands(rng, sign)
        spoken = rng.choice(SIGNS[sign])
        tight = spoken in "+-*/" and rng.random() < 0.3
        expression = f"{a}{spoken}{b}" if tight else f"{a} {spoken} {b}"
        value = str(result(a, sign, b))
        question = rng.choice(QUESTIONS).format(e=expression)
        # Tables are small and must be known whole; sums of two digits are held out by their operands.
        key = ("sum", a, sign, b) if sign in "+-" and max(a, b) > 20 else ("sum", question)
        return key, [Turn(question, f"{a} {sign} {b} = {value}", value)]

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
        first = rng.choice((1, 1, 1, rng.randint(0, 30)))
        last = first + rng.randint(2, 20)
        wording = rng.choice(
            ("Count from {a} to {b}.", "Count from {a} to {b}", "Please count from {a} to {b}.")
        )
        if first == 1:
            wording = rng.choice((wording, "Count to {b}.", "Count to {b}"))
        answer = ", ".join(str(i) for i in range(first, last + 1))
        return ("count", first, last), [Turn(wording.format(a=first, b=last), answer)]

    return draw(rng, held_out, propose)


def turns(rng: random.Random, held_out: bool) -> list[Turn]:
    return rng.choices((sum_turns, compare_turns, count_turns), (8, 1, 1))[0](rng, held_out)
