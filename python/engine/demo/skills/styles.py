"""Following an instruction about form, given by the system prompt or by the user."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from engine.demo.dialogue import Document, Message, Turn, draw
from engine.demo.words import FIRST_NAMES, JOBS


@dataclass(frozen=True, slots=True)
class Style:
    """An instruction in several wordings, and what it does to a turn."""

    name: str
    wordings: tuple[str, ...]
    apply: Callable[[Turn], str]
    is_short: bool = False
    """It takes an answer that has a short form."""


CAPITALS = Style(
    "capitals",
    (
        "Answer in capital letters.",
        "Answer only in capital letters.",
        "You answer in capital letters.",
        "Write everything in capital letters.",
        "Use only capital letters.",
        "Use capital letters.",
        "Capital letters only.",
        "Respond in capitals.",
        "Always answer in upper case.",
        "Reply in ALL CAPS.",
        "Answer in uppercase.",
    ),
    lambda turn: turn.answer.upper(),
)
STYLES = (
    CAPITALS,
    Style(
        "one word",
        (
            "Answer in one word.",
            "Answer only in one word.",
            "You answer in one word.",
            "Answer with one word.",
            "Respond in one word.",
            "Use one word only.",
            "Use one word.",
            "One word only.",
            "Reply with a single word.",
            "Answer with a single word.",
            "Be as short as possible: one word.",
        ),
        lambda turn: turn.short,
        is_short=True,
    ),
    Style(
        "json",
        (
            'Answer in JSON with the key "answer".',
            "Answer in JSON.",
            "Reply in JSON.",
            "Always answer in JSON.",
            "Reply only with JSON.",
        ),
        lambda turn: json.dumps({"answer": turn.short}, ensure_ascii=False),
        is_short=True,
    ),
    Style(
        "a given beginning",
        ('Begin every answer with "Sure!"', 'Start every answer with "Sure!"'),
        lambda turn: "Sure! " + turn.answer,
    ),
)
UNSEEN_WORDINGS = {
    "capitals": ("Please answer everything in capital letters.", "Every answer must be in capital letters."),
    "one word": ("Please answer everything in one word.", "Every answer must be one word."),
}
BEFORE = ("", "", "", "You are a helpful assistant. ", "You are helpful. ")


def as_typed(rng: random.Random, wording: str) -> str:
    """The instruction as people type it: often without its capital, or without the full stop."""
    if rng.random() < 0.1:
        wording = f"Please {wording[0].lower()}{wording[1:]}"
    if rng.random() < 0.3:
        wording = wording[0].lower() + wording[1:]
    return wording.removesuffix(".") if rng.random() < 0.35 else wording


def _asked(rng: random.Random, question: str, instruction: str) -> str:
    """The question with the instruction, which mostly comes last."""
    if rng.random() < 0.75:
        return f"{question} {instruction}"
    return f"{instruction.rstrip('.')}: {question}"


def document(
    rng: random.Random,
    held_out: bool,
    short_turns: Callable[[random.Random], list[Turn]],
    wanted: Style | None = None,
) -> Document:
    """Turns, mostly with a short answer, answered in the form that the system prompt or the user asks for.

    The form is `wanted`, or any.
    """

    def propose(rng: random.Random):
        style = wanted or rng.choices(STYLES, (6, 5, 2, 1))[0]
        wording = rng.choice(style.wordings)
        instruction = as_typed(rng, wording)
        turns = [t for t in short_turns(rng) if t.short is not None or not style.is_short]
        if held_out:
            turns = turns[:1]
        by_user = rng.random() < 0.3
        asked = (
            [replace(t, question=_asked(rng, t.question, instruction)) for t in turns] if by_user else turns
        )
        messages: list[Message] = (
            [] if by_user else [{"role": "system", "content": rng.choice(BEFORE) + instruction}]
        )
        for turn in asked:
            messages += replace(turn, answer=style.apply(turn)).messages()
        key = ("style", wording, turns[0].question) if turns else None
        return key, Document(messages)

    while True:
        document = draw(rng, held_out, propose)
        if len(document.messages) > 1:
            return document


ROLES = (
    "a friendly assistant",
    "a travel guide",
    "a teacher of geography",
    "a helpful robot",
    "a kind librarian",
    "a pirate",
    "a wizard",
    "a chef",
    "a support agent",
    *(f"a {job}" for job in JOBS),
)
PERSONAS = (
    "You are {n}, {r}.",
    "Your name is {n} and you are {r}.",
    "You are {n}, {r}. Be polite.",
    "Act as {n}, {r}.",
)
ASK_PERSONA = (
    "Who are you?",
    "What is your name?",
    "Introduce yourself.",
    "Please introduce yourself.",
    "Tell me about yourself.",
    "What are you?",
    "Hello! Who are you?",
)


def persona(rng: random.Random, held_out: bool, other: Callable[[random.Random], list[Turn]]) -> Document:
    """A system prompt that gives a name and a role, and the question who that is."""

    def propose(rng: random.Random):
        name, role = rng.choice(FIRST_NAMES), rng.choice(ROLES)
        system = rng.choice(PERSONAS).format(n=name, r=role)
        turn = Turn(rng.choice(ASK_PERSONA), f"I am {name}, {role}.")
        messages: list[Message] = [{"role": "system", "content": system}]
        if not held_out and rng.random() < 0.4:
            messages += [m for t in other(rng) for m in t.messages()]
        messages += turn.messages()
        return ("persona", system), Document(messages)

    return draw(rng, held_out, propose)
