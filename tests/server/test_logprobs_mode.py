"""A served model of 16 tokens that reports processed log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from helpers.server_process import ServerProcess, write_llama

VOCAB_SIZE = 16


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = write_llama(tmp_path_factory.mktemp("tiny-vocabulary"), vocab_size=VOCAB_SIZE)
    flags = "--load-format dummy --num-threads 1 --max-total-tokens 512 --logprobs-mode processed_logprobs"
    with ServerProcess("--model-path", str(directory), *flags.split()) as process:
        process.wait_ready()
        yield process
        assert process.stop() == 0
        assert "Traceback" not in process.log


def scores(server: ServerProcess, **fields: Any) -> dict[str, Any]:
    body = {"model": "default", "prompt": [3, 4, 5], "logprobs": 20, "max_tokens": 4, "ignore_eos": True}
    response = server.http.post("/v1/completions", json={**body, **fields})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["logprobs"]


def test_there_are_as_many_alternatives_as_tokens(server: ServerProcess) -> None:
    for top in scores(server)["top_logprobs"]:
        assert len(top) == VOCAB_SIZE
        assert math.fsum(map(math.exp, top.values())) == pytest.approx(1, abs=1e-5)
    echoed = scores(server, echo=True, max_tokens=1)
    assert [top and len(top) for top in echoed["top_logprobs"]] == [None, *[VOCAB_SIZE] * 3]


def test_scores_are_of_what_tokens_are_drawn_from(server: ServerProcess) -> None:
    cold, hot = (scores(server, temperature=t, max_tokens=1, seed=1)["top_logprobs"][0] for t in (0.1, 2))
    assert min(cold.values()) < min(hot.values()) < -0.5
    ratios = {
        (max(cold.values()) - cold[t]) / (max(hot.values()) - hot[t])
        for t in cold
        if hot[t] < max(hot.values())
    }
    assert all(ratio == pytest.approx(20, rel=1e-3) for ratio in ratios), "both are logits over temperature"


def test_dropped_tokens_have_a_number_that_json_can_write(server: ServerProcess) -> None:
    logprobs = scores(server, top_k=1, seed=1)
    assert logprobs["token_logprobs"] == [0.0] * 4
    for top in logprobs["top_logprobs"]:
        assert sorted(top.values()) == [-9999.0] * (VOCAB_SIZE - 1) + [0.0]


def test_it_is_shown(server: ServerProcess) -> None:
    assert server.http.get("/get_model_info").json()["logprobs_mode"] == "processed_logprobs"
