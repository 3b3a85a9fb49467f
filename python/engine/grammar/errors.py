"""What is wrong with a constraint."""

from __future__ import annotations


class GrammarError(Exception):
    """The constraint is at fault; the message goes to the client, after the name of the field."""


class TakesTooMuch(GrammarError):
    """Time, memory or the compiler's stack are not enough for it. Who says so adds where it is largest."""


class Unenforceable(GrammarError):
    """The constraint may be right as it is, but holds something that cannot be enforced."""
