"""What is wrong with a constraint."""

from __future__ import annotations


class GrammarError(Exception):
    """The constraint is at fault; the message goes to the client, after the name of the field."""


class Unenforceable(GrammarError):
    """The constraint may be right as it is, but holds something that cannot be enforced."""
