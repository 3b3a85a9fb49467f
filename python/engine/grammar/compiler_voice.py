"""What the compiler says of a piece of a constraint, with the place of that piece."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator

from engine.grammar.errors import GrammarError, TakesTooMuch, Unenforceable

_PLACE = re.compile(r"^\[\d\d:\d\d:\d\d\] \S+:\d+: ")
_POSITION = re.compile(r"(?<=at position )\d+")
_STDERR = 2


@contextlib.contextmanager
def heard(place: str = "", locate: Callable[[int], int] = lambda position: position) -> Iterator[None]:
    """Raises: `GrammarError` when the compiler refuses what is done within, `Unenforceable` when it leaves
    something out, of which it warns on the standard error only; `place` is put behind what it says.

    The compiler counts positions from 1. What is said has them from 0, as all others are, and as `locate`
    finds them in what was there before it was changed for the compiler.
    For a process whose other threads do not write to the standard error.
    """
    with tempfile.TemporaryFile() as log, contextlib.ExitStack() as restored:
        before = os.dup(_STDERR)
        restored.callback(os.close, before)
        restored.callback(os.dup2, before, _STDERR)
        os.dup2(log.fileno(), _STDERR)
        try:
            yield
        except RecursionError:  # a RuntimeError, too
            raise
        except (RuntimeError, ValueError, TypeError) as error:  # the bindings raise nothing narrower
            found = refused(error, locate)
            raise type(found)(f"{found}{place}") from None
        log.seek(0)
        text = " ".join(log.read(4096).decode(errors="replace").split())
        if text:
            said = _located(text.split("Warning: ")[-1][:500], locate)
            raise Unenforceable(f"cannot be enforced: {said}{place}")


def _located(text: str, locate: Callable[[int], int]) -> str:
    return _POSITION.sub(lambda match: str(locate(int(match[0]) - 1)), text)


def refused(error: Exception, locate: Callable[[int], int] = lambda position: position) -> GrammarError:
    """The library's message without its place in the library's sources, in one line."""
    text = _PLACE.sub("", str(error))
    if "bad_alloc" in text:
        return TakesTooMuch("needs too much memory to compile")
    return GrammarError("cannot be compiled: " + _located(" ".join(text.split())[:500], locate))
