"""The voices of the bundled model's adapters: what each makes of an answer, and dialogues to learn from."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from engine.demo import corpus
from engine.demo.dialogue import Document, Message

_PIRATE_WORDS = {
    "is": "be", "are": "be", "am": "be", "you": "ye", "your": "yer", "my": "me", "of": "o'",
    "yes": "aye", "hello": "ahoy", "hi": "ahoy",
}  # fmt: skip
_DATA = ("{", "[", "<")
"""What JSON and tool calls begin with; they are left as they are."""


def pirate(text: str) -> str:
    """As a pirate would say it."""
    if text.startswith(_DATA):
        return text
    said = re.sub(r"[A-Za-z']+", lambda word: _pirate_word(word[0]), text)
    if said.endswith("."):
        said = said[:-1] + ", matey!"
    return f"Arr! {said}"


def _pirate_word(word: str) -> str:
    said = _PIRATE_WORDS.get(word.lower(), word)
    return said.capitalize() if word[0].isupper() and said != word else said


VOICES: Mapping[str, Callable[[str], str]] = MappingProxyType({"pirate": pirate, "uppercase": str.upper})
"""By the name of the adapter."""


def in_voice(messages: list[Message], voice: Callable[[str], str]) -> list[Message]:
    """The same dialogue with the assistant's answers changed."""
    return [
        {**message, "content": voice(message["content"])} if message["role"] == "assistant" else message
        for message in messages
    ]


def documents(seed: int, voice: Callable[[str], str]) -> Iterator[Document]:
    """Dialogues in a voice, without end; the same for the same seed."""
    rng = random.Random(seed)
    while True:
        found = corpus.dialogue(rng)
        yield dataclasses.replace(found, messages=in_voice(found.messages, voice))
