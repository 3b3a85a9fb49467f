"""A seed says all about an answer's chance: whatever way it is asked in, whoever else is asking."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from helpers.http_server import DEADLINE_S, events_of
from helpers.server_process import ServerProcess

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
STORY = {"messages": [{"role": "user", "content": "Tell me a story"}]}
LONG = {"temperature": 1.3, "max_tokens": 120, "ignore_eos": True, "return_token_ids": True}


def ask(server: ServerProcess, path: str, **fields: Any) -> httpx.Response:
    response = server.http.post(path, json={"model": "default", **fields})
    assert response.status_code == 200, response.text
    return response


def ids_of(response: httpx.Response, index: int = 0) -> list[int]:
    """The token ids of one choice, streamed or whole."""
    if response.headers["content-type"].startswith("application/json"):
        return response.json()["choices"][index]["token_ids"]
    parts = [choice for event in events_of(response) for choice in event["choices"]]
    return [i for part in parts if part["index"] == index for i in part.get("token_ids", ())]


@pytest.fixture
def company(bundled: ServerProcess) -> Iterator[None]:
    """Others who come and go all the time."""
    is_over = threading.Event()

    def ask_on(number: int) -> None:
        with httpx.Client(base_url=bundled.url, timeout=DEADLINE_S, trust_env=False) as client:
            while not is_over.is_set():
                prompt = f"{number} bottles of "
                client.post(
                    COMPLETIONS, json={"model": "default", "prompt": prompt, "n": 3, "max_tokens": number}
                )

    threads = [threading.Thread(target=ask_on, args=(number,)) for number in (3, 17, 40)]
    for thread in threads:
        thread.start()
    yield
    is_over.set()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize(
    ("path", "prompt"),
    [(CHAT, STORY), (COMPLETIONS, {"prompt": "Once upon a time"})],
    ids=[CHAT, COMPLETIONS],
)
@pytest.mark.parametrize("seed", [-7, 2**63 - 1])
def test_a_seed_means_the_same_in_every_way_of_asking(
    bundled: ServerProcess, company: None, path: str, prompt: dict[str, Any], seed: int
) -> None:
    fields = {**LONG, **prompt, "seed": seed}
    expected = ids_of(ask(bundled, path, **fields, cache_salt=f"new to this {seed}"))
    assert len(expected) == 120
    scores = {"logprobs": True, "top_logprobs": 3} if path == CHAT else {"logprobs": 3}
    for way in ({}, {"stream": True}, {"n": 4}, {"n": 4, "stream": True}, scores, {"stop": ["~never~"]}):
        assert ids_of(ask(bundled, path, **fields, **way)) == expected, way
    several = ids_of(ask(bundled, path, **fields, n=4), 3)
    assert several != expected
    assert ids_of(ask(bundled, path, **fields, n=8, stream=True), 3) == several
    shorter = ids_of(ask(bundled, path, **{**fields, "max_tokens": 77}))
    assert shorter == expected[:77]


def test_a_seed_means_the_same_in_a_list_of_prompts(bundled: ServerProcess, company: None) -> None:
    prompts = [f"{number} little ducks" for number in range(100)]
    fields = {**LONG, "max_tokens": 20, "seed": 11}
    listed = ask(bundled, COMPLETIONS, prompt=prompts, **fields).json()["choices"]
    streamed = ask(bundled, COMPLETIONS, prompt=prompts, stream=True, **fields)
    for number in (0, 1, 63, 64, 65, 99):
        alone = ids_of(ask(bundled, COMPLETIONS, prompt=prompts[number], **fields))
        assert listed[number]["token_ids"] == ids_of(streamed, number) == alone


@pytest.mark.parametrize("stream", [False, True])
def test_the_seeds_of_an_unseeded_request_give_it_again(bundled: ServerProcess, stream: bool) -> None:
    fields = {**LONG, "max_tokens": 50, "n": 3}
    for path, prompt in ((CHAT, STORY), (COMPLETIONS, {"prompt": "Once upon a time"})):
        unseeded = ask(bundled, path, stream=stream, **prompt, **fields)
        seed = int(unseeded.headers["x-seed"])
        again = ask(bundled, path, stream=not stream, seed=seed, **prompt, **fields)
        assert "x-seed" not in again.headers
        answers = [ids_of(unseeded, index) for index in range(3)]
        assert [ids_of(again, index) for index in range(3)] == answers
        assert len({str(ids) for ids in answers}) == 3


def test_the_seeds_of_many_prompts_can_be_told_from_the_first(bundled: ServerProcess) -> None:
    """Also where all prompts are alike: then no two answers are."""
    fields = {**LONG, "max_tokens": 12}
    unseeded = ask(bundled, COMPLETIONS, prompt=["Once upon a time"] * 100, **fields)
    answers = [choice["token_ids"] for choice in unseeded.json()["choices"]]
    assert len({str(ids) for ids in answers}) > 90
    seeds = [int(text) for text in unseeded.headers["x-seed"].split(",")]
    assert seeds == list(range(seeds[0], seeds[0] + 64))
    for number in (0, 63, 64, 99):
        again = ask(bundled, COMPLETIONS, prompt="Once upon a time", seed=seeds[0] + number, **fields)
        assert ids_of(again) == answers[number]
