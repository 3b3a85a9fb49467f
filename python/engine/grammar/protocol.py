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


class Prepared(msgspec.Struct, array_like=True):
    """A constraint as the compiler takes it: a grammar in GBNF, or a structural tag made of such."""

    text: str
    is_tag: bool


class Refusal(msgspec.Struct, array_like=True, tag=1):
    """What is wrong with a constraint; `takes_too_much`: for the compiler, which has not said where."""

    text: str
    takes_too_much: bool = False


class Passed(msgspec.Struct, array_like=True, tag=2):
    """A constraint compiles, and can be matched; `largest` says where it is, should that take too much.

    `compile_s`: processor time of its compilation, beside what was done to prepare and to match it.
    """

    grammar: Prepared
    largest: str
    compile_s: float


class Verdict(msgspec.Struct, array_like=True):
    """The end of a job."""

    number: int
    result: Refusal | Passed
