"""Telling a client which of its fields mean nothing here."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Collection, Iterable, Sequence
from urllib.parse import quote

from engine.errors import InvalidRequest
from engine.server.metrics import Metrics

_MAX_SHOWN = 20
_MAX_NAME_CHARS = 64
_ABOUT_THE_ACCOUNT = frozenset({"metadata", "store", "service_tier"})
"""What OpenAI does with a request beside answering it: no mistake, so never refused."""


class IgnoredFields:
    """What becomes of fields that no route knows: they are counted, or refused if `is_strict`."""

    def __init__(self, metrics: Metrics, *, is_strict: bool) -> None:
        self._metrics = metrics
        self._is_strict = is_strict

    def check(self, names: Sequence[str], known: Collection[str] = ()) -> None:
        """Raises `InvalidRequest` for any name where that is asked for; `known` are those it may mean."""
        if not names:
            return
        wrong = [name for name in names if name not in _ABOUT_THE_ACCOUNT]
        if self._is_strict and wrong:
            raise _unknown(shorten(wrong)[0], known)
        self._metrics.ignored_fields.inc(len(names))


def _unknown(name: str, known: Collection[str]) -> InvalidRequest:
    near = [] if "." in name else difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return InvalidRequest(f"unknown field {name!r}{hint}", slug="unknown_parameter", param=name)


def ignored_header(names: Sequence[str]) -> dict[str, str]:
    """The header that names unknown fields; none if there are none."""
    if not names:
        return {}
    # Names come from the client: only what is harmless in a header goes back.
    return {"x-ignored-params": ",".join(quote(name, safe="[]") for name in shorten(names))}


def shorten(names: Iterable[str]) -> list[str]:
    """The first few names, each cut to what a person would read."""
    return [name[:_MAX_NAME_CHARS] for name in itertools.islice(names, _MAX_SHOWN)]
