"""What the compiler says of a piece of a constraint, with the place of that piece."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator

from engine.grammar.errors import GrammarError, Unenforceable

_PLACE = re.compile(r"^\[\d\d:\d\d:\d\d\] \S+:\d+: ")
_STDERR = 2


@contextlib.contextmanager
def heard(place: str = "") -> Iterator[None]:
    """Raises: `GrammarError` when the compiler refuses what is done within, `Unenforceable` when it leaves
    something out, of which it warns on the standard error only; `place` is put behind what it says.

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
            raise GrammarError(reason(error) + place) from None
        log.seek(0)
        text = " ".join(log.read(4096).decode(errors="replace").split())
        if text:
            raise Unenforceable(f"cannot be enforced: {text.split('Warning: ')[-1][:500]}{place}")


def reason(error: Exception) -> str:
    """The library's message without its place in the library's sources, in one line."""
    text = _PLACE.sub("", str(error))
    if "bad_alloc" in text:
        return "needs too much memory to compile"
    return "cannot be compiled: " + " ".join(text.split())[:500]
