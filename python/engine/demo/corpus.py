"""The corpus: an endless, repeatable stream of documents drawn from the skills.

The same seed gives the same documents. Everything that `is_held_out` is left to the evaluation.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from engine.demo.dialogue import Document, Message, Turn
from engine.demo.skills import (
    arithmetic,
    chat,
    drills,
    echo,
    geography,
    json_objects,
    plain,
    stories,
    styles,
    tools,
    unknown,
)

SKILLS = {
    "geography": (geography, 42),
    "chat": (chat, 12),
    "arithmetic": (arithmetic, 14),
    "stories": (stories, 8),
    "json_objects": (json_objects, 10),
    "unknown": (unknown, 7),
    "echo": (echo, 7),
}
DOCUMENT_WEIGHTS = {"dialogue": 58, "tools": 18, "style": 13, "persona": 3, "plain": 8}
TURN_COUNTS = ((1, 52), (2, 20), (3, 12), (5, 9), (9, 4.5), (20, 1.5), (40, 1))
HELPFUL = (
    "You are a helpful assistant.",
    "You are a helpful assistant",
    "You are a helpful AI assistant.",
    "You are a friendly assistant.",
    "You are a polite and helpful assistant.",
    "You are an AI assistant. Answer the questions of the user.",
    "You are a helpful, honest and harmless assistant.",
    "Answer the question of the user.",
    "You are a geography expert.",
    "Be brief and friendly.",
    "You are a useful assistant who answers questions.",
    "You are a chatbot.",
    "Be concise.",
    "You are a helpful assistant that answers in English.",
)


def any_turns(rng: random.Random) -> list[Turn]:
    modules, weights = zip(*SKILLS.values(), strict=True)
    return rng.choices(modules, weights)[0].turns(rng, False)


def short_turns(rng: random.Random) -> list[Turn]:
    """Turns whose answers can mostly be given in one word."""
    source = rng.choices((geography.fact_turns, arithmetic.sum_turns, chat.turns), (65, 25, 10))[0]
    return [t for _ in range(rng.choice((1, 1, 2, 3))) for t in source(rng, False)]


def _sloppy(rng: random.Random, question: str) -> str:
    """The question as people type it: sometimes without capitals, sometimes without the last mark."""
    if rng.random() < 0.05:
        question = question.lower()
    if rng.random() < 0.05:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.06 and question.endswith("?"):
        question = question[:-1]
    return question


def _system(rng: random.Random) -> list[Message]:
    """No system prompt, a plain one, or a long one that has nothing to do with the questions."""
    roll = rng.random()
    if roll < 0.5:
        return []
    if roll < 0.95:
        return [{"role": "system", "content": rng.choice(HELPFUL)}]
    notes = " ".join(plain.document(rng).text or "" for _ in range(rng.randint(1, 6)))
    return [{"role": "system", "content": f"{rng.choice(HELPFUL)}\n\n{notes}"}]


def dialogue(rng: random.Random) -> Document:
    """Turns of any skill, perhaps after a system prompt."""
    counts, weights = zip(*TURN_COUNTS, strict=True)
    wanted = rng.choices(counts, weights)[0]
    messages = _system(rng)
    turns = 0
    while turns < wanted:
        unanswerable = rng.random() < 0.03
        for turn in tools.without_tool_turns(rng, False) if unanswerable else any_turns(rng):
            echoed = turn.answer in turn.question
            asked = turn if echoed else Turn(_sloppy(rng, turn.question), turn.answer)
            messages += asked.messages()
            turns += 1
    return Document(messages)


def document(rng: random.Random) -> Document:
    """One training document."""
    kind = rng.choices(tuple(DOCUMENT_WEIGHTS), tuple(DOCUMENT_WEIGHTS.values()))[0]
    if kind == "plain":
        return plain.document(rng)
    if kind == "tools":
        found = tools.document(rng, False, any_turns)
        if rng.random() < 0.4:
            found.messages.insert(0, {"role": "system", "content": rng.choice(HELPFUL)})
        return found
    if kind == "style":
        return styles.document(rng, False, short_turns)
    if kind == "persona":
        return styles.persona(rng, False, any_turns)
    return dialogue(rng)


def documents(seed: int, drill_share: float = 0.0) -> Iterator[Document]:
    """Training documents without end; the same for the same seed. `drill_share` of them are drills."""
    rng = random.Random(seed)
    while True:
        yield drills.document(rng, short_turns) if rng.random() < drill_share else document(rng)
