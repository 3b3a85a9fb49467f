"""What an answer must look like: the constraint of one request, as it travels to the engine."""

from __future__ import annotations

from typing import Literal

import msgspec

from engine.errors import InvalidRequest

MAX_CONSTRAINT_CHARS = 2**18

ConstraintKind = Literal["json_schema", "json_object", "regex", "ebnf", "choice", "structural_tag"]


class Constraint(msgspec.Struct, frozen=True, omit_defaults=True):
    """The whole answer matches `text`, read according to `kind`.

    json_schema: a JSON schema; json_object: any JSON object (no text); regex: an ECMAScript regular
    expression, matched whole; ebnf: a grammar in GBNF with the rule `root`; choice: a JSON array of
    strings; structural_tag: a structural tag of xgrammar, as JSON.

    Thoughts before the answer do not count (`Thinking`). `param` is the request field that an error
    names.
    """

    kind: ConstraintKind
    text: str = ""
    param: str = "constraint"

    def __post_init__(self) -> None:
        if len(self.text) > MAX_CONSTRAINT_CHARS:
            raise InvalidRequest(
                f"Invalid request: {self.param} is too large: {len(self.text)} characters, "
                f"more than {MAX_CONSTRAINT_CHARS}",
                param=self.param,
            )
        if not self.text.isascii():
            try:
                self.text.encode()
            except UnicodeEncodeError as error:
                raise InvalidRequest(
                    f"Invalid request: {self.param} holds half of a character at position {error.start}",
                    param=self.param,
                ) from None

    @property
    def key(self) -> tuple[str, str]:
        """What decides about the compiled grammar."""
        return self.kind, self.text


class ThoughtMessages(msgspec.Struct, frozen=True, tag="messages"):
    """Thoughts that are messages within the answer, whose constraint says where they may come.

    Each is from the token `channel` on, behind which it is named, to `end`; all of them take at most
    `budget` tokens.
    """

    channel: int
    end: int
    budget: int


class Thinking(msgspec.Struct, frozen=True, omit_defaults=True, tag="tags"):
    """Thoughts before the answer: no constraint holds for them, and they may be bounded.

    They end with the first appearance of the tokens `end`. They begin with `start`, if that is the first
    token of the output but for those of `blank`, int32, which are white space or no text at all; if there
    is no `start`, the prompt has begun them. When `budget` tokens are used up, `start` among them,
    `closing` is written, which ends with `end`; it is written at once, and counts as well, so that at least
    as many tokens are needed.
    """

    end: tuple[int, ...]
    start: int | None = None
    budget: int | None = None
    closing: tuple[int, ...] = ()
    blank: bytes = b""
