"""A table of a request's fields: what each does left out, at its default, and at both ends of its range."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from helpers.server_process import ServerProcess

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BOTH = (CHAT, COMPLETIONS)
STORY = [{"role": "user", "content": "Tell me a story"}]
CONTEXT, VOCAB = 2048, 4096
"""Of the bundled model."""

LARGEST = 2**63 - 1


class Asker:
    """Asks one endpoint of the bundled model."""

    def __init__(self, server: ServerProcess, path: str) -> None:
        self._server, self.path = server, path
        self.is_chat = path == CHAT
        self.end = server.http.post(
            "/tokenize", json={"model": "default", "prompt": "<|im_end|>", "add_special_tokens": False}
        ).json()["tokens"][0]

    def post(self, **fields: Any) -> Any:
        prompt = {"messages": STORY} if self.is_chat else {"prompt": "Once upon a time"}
        body = {"model": "default", "return_token_ids": True, **prompt, **fields}
        response = self._server.http.post(self.path, json=body)
        assert response.status_code == 200, response.text
        assert "x-ignored-params" not in response.headers
        return response

    def __call__(self, **fields: Any) -> dict[str, Any]:
        return self.post(**fields).json()

    def choices(self, **fields: Any) -> list[dict[str, Any]]:
        """What can be compared between requests: all but names and times."""
        choices = self(**fields)["choices"]
        for choice in choices:
            choice["text"] = choice["message"]["content"] if self.is_chat else choice["text"]
        return choices

    def ids(self, **fields: Any) -> list[list[int]]:
        return [choice["token_ids"] for choice in self.choices(**fields)]

    def first_ids(self, **fields: Any) -> Counter[int]:
        """The first token of 128 answers to what leaves it open."""
        prompt = {} if self.is_chat else {"prompt": "The"}
        fields = {"n": 128, "max_tokens": 1, "ignore_eos": True, **prompt, **fields}
        return Counter(ids[0] for ids in self.ids(seed=1, **fields))

    @property
    def scores(self) -> dict[str, Any]:
        """Asks for no more than the log-probability of each token."""
        return {"logprobs": True} if self.is_chat else {"logprobs": 0}

    def top(self, num: int) -> dict[str, Any]:
        return {"logprobs": True, "top_logprobs": num} if self.is_chat else {"logprobs": num}


@dataclasses.dataclass(frozen=True)
class Row:
    """`default` does what leaving out does; `show` fails unless `low` and `high` do what they are for."""

    default: Any
    low: Any
    high: Any
    paths: tuple[str, ...]
    show: Callable[[Asker, Any, Any], None]


class Table(dict[str, Row]):
    """Rows by the name of the field, which may have other words before it."""

    def row(
        self, name: str, default: Any, low: Any, high: Any, paths: tuple[str, ...] = BOTH
    ) -> Callable[[Any], Any]:
        def add(show: Callable[[Asker, Any, Any], None]) -> Callable[[Asker, Any, Any], None]:
            assert name not in self
            self[name] = Row(default, low, high, paths, show)
            return show

        return add

    def cases(self) -> Any:
        """Parameters `ask` and `name` of a test: each row on each of its paths."""
        cases = [
            pytest.param(path, name, id=f"{name} {path}") for name, row in self.items() for path in row.paths
        ]
        return pytest.mark.parametrize(("ask", "name"), cases, indirect=["ask"])

    def check_ends(self, ask: Asker, name: str) -> None:
        """At both ends of its range a field does what it is for."""
        self[name].show(ask, self[name].low, self[name].high)

    def check_default(self, ask: Asker, name: str) -> None:
        """A field at its default does what happens without it."""
        field, row = name.split()[-1], self[name]
        others = {"logprobs": True} if field == "top_logprobs" else {}
        # Where the default is no value of its own, null stands for it.
        if field == "seed":
            return  # shown by its row: without one, no two answers are alike
        fixed = {"seed": 2, **others} if field == "stop" else {"seed": 2, "stop": ["~~"], **others}
        left_out, given = ask(**fixed), {**fixed, field: row.default}
        if field == "return_token_ids":
            left_out, told = ask(**{**given, field: None}), ask(**given)
            assert told["choices"] == left_out["choices"]
            return
        answer = ask(**given)
        assert answer["choices"] == left_out["choices"] and answer["usage"] == left_out["usage"]
