"""What is wrong with a constraint."""

from __future__ import annotations


class GrammarError(Exception):
    """The constraint is at fault; the message goes to the client, after the name of the field."""
