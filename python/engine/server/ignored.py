"""Telling a client which of its fields mean nothing here."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

_MAX_SHOWN = 20
_MAX_NAME_CHARS = 64


def ignored_header(names: Sequence[str]) -> dict[str, str]:
    """The header that names unknown fields; none if there are none."""
    if not names:
        return {}
    # Names come from the client: only what is harmless in a header goes back.
    shown = [quote(name[:_MAX_NAME_CHARS], safe="[]") for name in names[:_MAX_SHOWN]]
    return {"x-ignored-params": ",".join(shown)}
