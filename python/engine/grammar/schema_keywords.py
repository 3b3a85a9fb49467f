"""Which keywords of a JSON schema are enforced; all others are refused."""

from __future__ import annotations

from typing import Any


def check_schema(schema: Any) -> None:
    """Refuse a schema with a keyword that would not be enforced."""
