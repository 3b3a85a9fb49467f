"""Telling a client which of its fields mean nothing here."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from urllib.parse import quote

_MAX_SHOWN = 20
_MAX_NAME_CHARS = 64


def ignored_header(names: Sequence[str]) -> dict[str, str]:
    """The header that names unknown fields; none if there are none."""
    if not names:
        return {}
    # Names come from the client: only what is harmless in a header goes back.
    return {"x-ignored-params": ",".join(quote(name, safe="[]") for name in shorten(names))}


def shorten(names: Iterable[str]) -> list[str]:
    """The first few names, each cut to what a person would read."""
    return [name[:_MAX_NAME_CHARS] for name in itertools.islice(names, _MAX_SHOWN)]
