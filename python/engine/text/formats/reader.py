"""Text that arrives in pieces, for parsers written as if all of it were there.

A parser is a generator over a `Reader`: where it needs more text than there is, it yields, and goes
on when more has come. What it finds it reports through the reader as events. So a format is read by
plain code, and what is found cannot depend on how the text was cut.
"""

from __future__ import annotations

import enum
import string
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from typing import TypeVar

from engine.text.formats.events import (
    CallArguments,
    CallEnd,
    CallRejected,
    CallStart,
    Content,
    Event,
    Reasoning,
)

T = TypeVar("T")
Steps = Generator[None, None, T]
"""A parser that returns T when it is through."""


SPACE = string.whitespace
"""ASCII's: each is a byte, so that a token is white space, or is not, whatever stands beside it."""


class Stage(enum.Enum):
    """What the newest text belongs to."""

    UNDECIDED = "undecided"
    THINKING = "thinking"
    ANSWERING = "answering"


class Malformed(Exception):
    """The text is not what its format asks for here."""


class Reader:
    """Input and events of one output. `tool_names` are the tools that may be called.

    White space around content is held back until it is known what follows: next to calls and
    thoughts it only separates, and is left out. With `keeps_space` it is not: it is part of the answer.

    Cost: linear in the text; what is kept is the text of one unfinished call.
    """

    def __init__(self, tool_names: Collection[str] = (), *, keeps_space: bool = False) -> None:
        self.tool_names = frozenset(tool_names)
        self._keeps_space = keeps_space
        self.text = ""
        """What has arrived and is not taken yet."""

        self.is_complete = False
        """No more text will come."""

        self.is_cut = False
        """The text was ended from outside (a limit, an abort), not by the model."""

        self.tag_starts: set[int] | None = None
        """Where tags begin that are tokens, in characters of the whole text; None: any text may be a tag."""

        self.stage = Stage.UNDECIDED
        self.has_thought = False
        """Whether there were thoughts, or what marks them."""

        self._num_taken = 0
        self._events: list[Event] = []
        self._attempt: list[str] | None = None
        self._name = ""
        self._call: int | None = None
        self._num_calls = 0
        self._space = ""
        self._has_content = False
        self._has_other = False

    def take_events(self) -> list[Event]:
        """The events since the last time."""
        events, self._events = self._events, []
        return events

    # --- reading

    def take(self, num_chars: int) -> str:
        """Take the next characters."""
        taken, self.text = self.text[:num_chars], self.text[num_chars:]
        self._num_taken += len(taken)
        if self._attempt is not None:
            self._attempt.append(taken)
        return taken

    def pass_until(self, markers: Sequence[str], emit: Callable[[str], object]) -> Steps[str | None]:
        """Give text to `emit` up to the first of `markers`; returns that marker, or None at the end.

        The marker itself is not taken. No marker may be the beginning of another one.
        """
        while True:
            found = [(at, marker) for marker in markers if (at := self.text.find(marker)) >= 0]
            if found:
                at, marker = min(found)
                emit(self.take(at))
                return marker
            num_held = 0 if self.is_complete else overlap(self.text, markers)
            emit(self.take(len(self.text) - num_held))
            if self.is_complete:
                return None
            yield

    def take_until(self, markers: Sequence[str]) -> Steps[tuple[str, str]]:
        """Take text up to the first of `markers`, and the marker. Raises: `Malformed` if there is none."""
        pieces: list[str] = []
        marker = yield from self.pass_until(markers, pieces.append)
        if marker is None:
            raise Malformed
        self.take(len(marker))
        return "".join(pieces), marker

    def is_tag(self, after: str = "") -> bool:
        """Whether a tag that the text goes on with, behind characters of `after`, is more than text."""
        at = self._num_taken + len(self.text) - len(self.text.lstrip(after))
        return self.tag_starts is None or at in self.tag_starts

    def starts_with(self, literal: str, *, after: str = "") -> Steps[bool]:
        """Whether the text goes on with characters of `after` and `literal`. Nothing is taken."""
        while True:
            rest = self.text.lstrip(after)
            if len(rest) >= len(literal) or not literal.startswith(rest) or self.is_complete:
                return rest.startswith(literal)
            yield

    def accept(self, literal: str) -> Steps[bool]:
        """Take `literal` if the text goes on with it; whether it did."""
        if (yield from self.starts_with(literal)):
            self.take(len(literal))
            return True
        return False

    def expect(self, literal: str) -> Steps[None]:
        """Take `literal`. Raises: `Malformed` if the text goes on with something else."""
        if not (yield from self.accept(literal)):
            raise Malformed

    def starts_with_any(self, literals: Iterable[str]) -> Steps[bool]:
        """Whether the text goes on with one of these. Nothing is taken."""
        for literal in literals:
            if (yield from self.starts_with(literal)):
                return True
        return False

    def skip_space(self) -> Steps[str]:
        """Take white space; returns the character behind it, "" at the end."""
        while True:
            self.take(len(self.text) - len(self.text.lstrip()))
            if self.text or self.is_complete:
                return self.text[:1]
            yield

    # --- what was found

    def content(self, text: str) -> None:
        text = self._space + text
        if self._has_other and not self._has_content and not self._keeps_space:
            text = text.lstrip()
        body = text.rstrip()
        self._space = text[len(body) :]
        if body:
            self._has_content = True
            self._events.append(Content(body))

    def reasoning(self, text: str) -> None:
        """More thoughts; white space at both ends is left out."""
        text = self._space + text if self._has_other else text.lstrip()
        body = text.rstrip()
        self._space = text[len(body) :]
        if body:
            self._has_other = True
            self._events.append(Reasoning(body))

    def end_reasoning(self) -> None:
        self._space = ""
        self._has_other = True

    def finish(self) -> None:
        """The text is read to its end."""
        is_kept = self._has_content or not self._has_other or self._keeps_space
        if self._space and not self._num_calls and is_kept:
            self._events.append(Content(self._space))

    def attempt(self, call: Steps[None]) -> Steps[None]:
        """Read a call, from its first marker on; all that `call` took becomes content if it is none.

        One that was cut off is a call as soon as its name is known. What comes of the calls beside it is
        left out.
        """
        self._attempt, self._name = [], ""
        is_right = True
        try:
            yield from call
        except Malformed:
            is_right = False
        attempted, self._attempt = self._attempt, None
        if self.is_complete and self.is_cut and (self._name or self._num_calls):
            if self._name:
                self.start_call()
            self._call, self.text = None, ""
        elif not is_right:
            self._reject("".join(attempted))

    def name_call(self, name: str) -> None:
        """The call that is read is one of this tool. Raises: `Malformed` if there is no such tool."""
        if name not in self.tool_names:
            raise Malformed
        self._name = name

    def start_call(self) -> None:
        """Report the call that was named; its arguments follow."""
        name, self._name = self._name, ""
        self._call = self._num_calls
        self._num_calls += 1
        self._has_other = True
        self._events.append(CallStart(self._call, name))

    def arguments(self, text: str) -> None:
        if text:
            self._events.append(CallArguments(self._open_call, text))

    def end_call(self) -> None:
        """The call is right; what is taken from here on is not part of it."""
        self._events.append(CallEnd(self._open_call))
        self._call = None
        self._attempt = []

    @property
    def _open_call(self) -> int:
        assert self._call is not None
        return self._call

    def _reject(self, text: str) -> None:
        call, self._call = self._call, None
        if call is not None:
            self._events.append(CallRejected(call))
        self.content(text)


def overlap(text: str, markers: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a marker."""
    longest = max(map(len, markers), default=1) - 1
    for num_chars in range(min(longest, len(text)), 0, -1):
        end = text[-num_chars:]
        if any(marker.startswith(end) for marker in markers):
            return num_chars
    return 0
