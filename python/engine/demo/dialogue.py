"""What the corpus is made of: turns, documents, and the rule that keeps some of them unseen."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]

HELD_OUT_ONE_IN = 10


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer. `short` is the answer in one word, where there is one."""

    question: str
    answer: str
    short: str | None = None

    def messages(self) -> list[Message]:
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]


@dataclass(slots=True)
class Document:
    """One training document: a dialogue (`messages`, `tools`), or plain `text` without markup."""

    messages: list[Message] = field(default_factory=list)
    tools: list[dict] | None = None
    text: str | None = None


def is_held_out(*key: object) -> bool:
    """Whether the combination `key` is kept for the evaluation: one in ten, by a fixed checksum."""
    return zlib.crc32("|".join(map(str, key)).encode()) % HELD_OUT_ONE_IN == 0


def draw(
    rng: random.Random, held_out: bool, propose: Callable[[random.Random], tuple[tuple | None, Any]]
) -> Any:
    """Draw from `propose`, which returns (key, value), until the key is on the wanted side.

    The key None marks what is too common to be kept from training, such as "Tell me a story".
    """
    while True:
        key, value = propose(rng)
        if (key is not None and is_held_out(*key)) == held_out:
            return value
