"""Bounds on what a request may ask for: what is at the bound is served, one more is refused and says why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from engine.grammar.regex_limits import MAX_GROUPS, MAX_REPETITIONS
from engine.sampling.constraint import MAX_CONSTRAINT_CHARS
from helpers.server_process import ServerProcess

VOCAB_SIZE = 4096
"""Of the bundled model: a token has one bias at most."""


def _nested(num_groups: int) -> str:
    return "(" * num_groups + "[ab]" + ")" * num_groups


def _class(num_chars: int) -> str:
    """A regular expression of so many characters, which all stand for one."""
    return "[" + (num_chars - 2) // 3 * "a-z" + (num_chars - 2) % 3 * "a" + "]"


@pytest.fixture(scope="module")
def patient() -> Iterator[ServerProcess]:
    """The largest regular expression takes seconds to compile, more of them on a busy machine."""
    with ServerProcess("--grammar-timeout", "50") as server:
        server.wait_ready()
        yield server
        assert server.stop() == 0


BOUNDS = {
    "entries of logit_bias": (
        "logit_bias",
        VOCAB_SIZE,
        lambda n: {str(i): -1 for i in range(n)},
        "names token 4096",
    ),
    "characters of a regex": ("regex", MAX_CONSTRAINT_CHARS, _class, "too large"),
    "repetitions in a regex": ("regex", MAX_REPETITIONS, lambda n: f"[ab]{{0,{n}}}", "repeats more"),
    "repetitions of repetitions": (
        "regex",
        1,
        lambda n: f"(x[ab]{{0,{MAX_REPETITIONS}}}){{0,{n}}}",
        "repeats more",
    ),
    "groups within each other": ("regex", MAX_GROUPS, _nested, "over 500"),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_at_the_bound_and_one_beyond(patient: ServerProcess, name: str) -> None:
    field, bound, make, what = BOUNDS[name]

    def ask(value: Any) -> httpx.Response:
        body = {"model": "default", "prompt": "x", "max_tokens": 2, field: value}
        return patient.http.post("/v1/completions", json=body)

    assert (served := ask(make(bound))).status_code == 200, served.text[:500]
    refused = ask(make(bound + 1))
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["param"] == field and what in error["message"], error
