"""What the engine and the grammar helper say to each other; the first message is `VocabularyData`."""

from __future__ import annotations

import msgspec

from engine.sampling.constraint import Constraint


class HelperSettings(msgspec.Struct):
    """What the helper is told when it starts."""

    tokenizer_path: str
    vocab_size: int
    timeout_s: float
    free_whitespace: bool


class Job(msgspec.Struct, array_like=True, tag=1):
    """A constraint to try."""

    number: int
    constraint: Constraint


class Forget(msgspec.Struct, array_like=True, tag=2):
    """Nobody waits for this job any more."""

    number: int


class Verdict(msgspec.Struct, array_like=True):
    """The end of a job: `refusal` says what is wrong with the constraint, None that it compiles."""

    number: int
    refusal: str | None
