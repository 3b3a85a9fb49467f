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


STYLES = (
    Style(
        "capitals",
        (
            "Answer in capital letters.",
            "Answer in capital letters",
            "Write everything in capital letters.",
            "Use only capital letters.",
            "Always answer in upper case.",
            "Reply in ALL CAPS.",
            "Answer in uppercase.",
        ),
        lambda turn: turn.answer.upper(),
    ),
    Style(
        "one word",
        (
            "Answer in one word.",
            "Answer in one word",
            "Answer with one word.",
            "Use one word only.",
            "One word only.",
            "Reply with a single word.",
            "Answer with a single word.",
            "Be as short as possible: one word.",
        ),
        lambda turn: turn.short,
    ),
    Style(
        "lower case",
        (
            "Answer in lower case.",
            "Write everything in small letters.",
            "Use only small letters.",
            "Reply in lowercase.",
        ),
        lambda turn: turn.answer.lower(),
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
    ),
    Style(
        "sir",
        ('Begin every answer with "Sure!"', 'Start every answer with "Sure!"'),
        lambda turn: "Sure! " + turn.answer,
    ),
)
BEFORE = ("", "", "", "You are a helpful assistant. ", "You are helpful. ")


def document(
    rng: random.Random, held_out: bool, short_turns: Callable[[random.Random], list[Turn]]
) -> Document:
    """Turns that have a short answer, answered in the form that the system prompt or the user asks for."""

    def propose(rng: random.Random):
        style = rng.choices(STYLES, (4, 4, 1, 2, 1))[0]
        wording = rng.choice(style.wordings)
        turns = [t for t in short_turns(rng) if t.short is not None]
        if held_out:
            turns = turns[:1]
        by_user = rng.random() < 0.3
        asked = [replace(t, question=f"{t.question} {wording}") for t in turns] if by_user else turns
        messages: list[Message] = (
            [] if by_user else [{"role": "system", "content": rng.choice(BEFORE) + wording}]
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
