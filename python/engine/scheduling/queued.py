"""What queues know of those that wait in them."""

from __future__ import annotations

from typing import Protocol


class Queued(Protocol):
    """A choice of a request to generate, or a request to embed. Told apart by identity."""

    choice: int
    prompt_len: int
    """Tokens; of a request's choices those of the first count."""
    arrival: int
    """Logical clock: order of arrival, unique."""
    priority: int
    client: str
    weight: float
