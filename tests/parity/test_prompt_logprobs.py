"""Log-probabilities of prompts: those of transformers, and the same bits whatever happens around them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from engine.cache.prefix_cache import PrefixCache
from engine.ops import reference
from engine.sampling.params import SamplingParams
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.settings import SchedulerSettings
from helpers.tiny_models import KINDS, VOCAB_SIZE, make_model, save_model
from parity.driving import BLOCK_SIZE, CONTEXT_LENGTH, NUM_BLOCKS, make_runner

NUM_TOP = 5
ATOL = 1e-4
"""Logits of the tiny models are of order 1 and agree with those of transformers to 1e-4 of that."""


@dataclasses.dataclass
class Served:
    """What came out, by request: (log-probability, top ids, top log-probabilities) of each token."""

    prompt: dict[str, list[tuple]] = dataclasses.field(default_factory=dict)
    output: dict[str, list[tuple]] = dataclasses.field(default_factory=dict)
    output_ids: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    num_resumed: int = 0
    """Rows that went on scoring after a preemption."""


def serve(
    runner, asks: dict[str, tuple[list[int], SamplingParams]], *, chunk=512, num_blocks=NUM_BLOCKS, waves=1
) -> Served:
    """Serve all requests together; with two waves, all of them again on what is cached by then."""
    settings = SchedulerSettings(
        context_length=min(CONTEXT_LENGTH, num_blocks * BLOCK_SIZE),
        vocab_size=VOCAB_SIZE,
        max_running_requests=4,
        max_queued_requests=100,
        chunked_prefill_size=chunk,
        debug_checks=True,
    )
    scheduler = Scheduler(settings, PrefixCache(num_blocks, BLOCK_SIZE))
    for _ in range(waves):
        served = Served()
        for name, (prompt, params) in asks.items():
            scheduler.submit(name, np.array(prompt, np.int32), params, seed=1)
        while scheduler.has_work:
            step(scheduler, runner, served)
    return served


def step(scheduler, runner, served: Served) -> None:
    plan = scheduler.schedule()
    result = runner.execute(plan)
    for row, scores in zip(plan.scored_rows, result.scores, strict=True):
        entries = served.prompt.setdefault(row.request.request_id, [])
        assert len(entries) == row.scored.start
        served.num_resumed += row.request.num_preemptions > 0 and row.scored.start > 0
        entries += zip(
            scores.logprobs.tolist(), scores.top_ids.tolist(), scores.top_logprobs.tolist(), strict=True
        )
    for row, new in enumerate(scheduler.update(plan, result)):
        if new.sampled is None:
            continue
        name, most = new.request.request_id, new.request.params.logprobs
        served.output_ids.setdefault(name, []).extend(new.token_ids)
        if most is not None:
            entry = result.logprobs[row], result.top_ids[row, :most], result.top_logprobs[row, :most]
            served.output.setdefault(name, []).append(tuple(part.tolist() for part in entry))


def make_prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB_SIZE, length).tolist()


def scoring(num_top=NUM_TOP, **fields) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 0, "prompt_logprobs": num_top, **fields})


@torch.no_grad()
def their_logprobs(model, prompt: list[int]) -> torch.Tensor:
    return model(torch.tensor([prompt]), use_cache=False).logits[0].float().log_softmax(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_those_of_transformers(kind, tmp_path):
    model = make_model(kind)
    runner = make_runner(save_model(model, tmp_path))
    for length in (2, 17, 200):
        prompt = make_prompt(length)
        entries = serve(runner, {"a": (prompt, scoring())}).prompt["a"]
        theirs = their_logprobs(model, prompt)[:-1]
        assert len(entries) == length - 1
        expected = theirs[torch.arange(length - 1), prompt[1:]]
        np.testing.assert_allclose([entry[0] for entry in entries], expected, rtol=0, atol=ATOL)
        np.testing.assert_allclose(
            [entry[2] for entry in entries], theirs.topk(NUM_TOP).values, rtol=0, atol=ATOL
        )
        for (_, top_ids, top_logprobs), row in zip(entries, theirs, strict=True):
            np.testing.assert_allclose(row[top_ids], top_logprobs, rtol=0, atol=ATOL)


def test_on_the_reference_ops_too(tmp_path):
    model = make_model("llama3")
    runner = make_runner(save_model(model, tmp_path), ops=reference)
    prompt = make_prompt(21)
    entries = serve(runner, {"a": (prompt, scoring())}).prompt["a"]
    expected = their_logprobs(model, prompt)[torch.arange(20), prompt[1:]]
    np.testing.assert_allclose([entry[0] for entry in entries], expected, rtol=0, atol=ATOL)


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    directory = save_model(make_model("mistral").bfloat16(), tmp_path_factory.mktemp("scores"))
    return make_runner(directory, dtype="bfloat16")


@pytest.fixture(scope="module")
def asks():
    common = make_prompt(70, seed=1)
    prompts = [common + make_prompt(count, seed=count) for count in (1, 9, 40)]
    prompts += [common, make_prompt(2), make_prompt(150, seed=2), make_prompt(33, seed=3)]
    asks = {}
    for index, prompt in enumerate(prompts):
        asks[f"only{index}"] = (prompt, scoring(num_top=index * 3))
        asks[f"both{index}"] = (prompt, scoring(max_tokens=20, logprobs=2, num_top=20 - index))
        asks[f"none{index}"] = (prompt, SamplingParams(temperature=0, max_tokens=20, logprobs=2))
    return asks


@pytest.fixture(scope="module")
def alone(runner, asks):
    """Each request by itself, in one chunk, on an empty cache."""
    every = Served()
    for name, ask in asks.items():
        one = serve(runner, {name: ask})
        every.prompt |= one.prompt
        every.output |= one.output
        every.output_ids |= one.output_ids
    return every


def assert_same(served: Served, expected: Served) -> None:
    assert served.prompt == expected.prompt
    assert served.output == expected.output
    assert served.output_ids == expected.output_ids


def test_every_position_has_a_score_of_its_own(alone, asks):
    for name, (prompt, params) in asks.items():
        if params.prompt_logprobs is None:
            assert name not in alone.prompt
        else:
            assert len(alone.prompt[name]) == len(prompt) - 1
            assert {len(entry[1]) for entry in alone.prompt[name]} == {params.prompt_logprobs}
    assert len({entry[0] for entries in alone.prompt.values() for entry in entries}) > 300


@pytest.mark.parametrize("chunk", [16, 512])
@pytest.mark.parametrize("waves", [1, 2])
def test_together_in_chunks_on_a_cold_and_a_warm_cache(runner, asks, alone, chunk, waves):
    assert_same(serve(runner, asks, chunk=chunk, waves=waves), alone)


def test_with_preemption_in_the_middle_of_scoring(runner):
    """Two answers grow until the youngest, which is busy scoring, has to give up its blocks."""
    asks = {f"grows{i}": (make_prompt(17, seed=i), scoring(max_tokens=120, num_top=1)) for i in range(2)}
    asks |= {f"only{i}": (make_prompt(150, seed=9 + i), scoring(num_top=i)) for i in range(2)}
    served = serve(runner, asks, chunk=4, num_blocks=20)
    assert served.num_resumed > 0
    for name, ask in asks.items():
        alone = serve(runner, {name: ask})
        assert alone.num_resumed == 0
        assert served.prompt[name] == alone.prompt[name]
        assert served.output_ids.get(name) == alone.output_ids.get(name)


def test_a_generated_token_gets_the_same_score_as_prompt(runner, alone, asks):
    for name in ("none0", "none5"):
        prompt = asks[name][0]
        again = serve(runner, {"again": (prompt + alone.output_ids[name], scoring(num_top=2))})
        assert again.prompt["again"][len(prompt) - 1 :] == alone.output[name]


def test_logits_never_take_more_memory_than_the_rows_of_a_step(runner, monkeypatch):
    sizes = []
    project = runner._scorer._project
    monkeypatch.setattr(
        runner._scorer, "_project", lambda hidden, first_row: sizes.append(len(hidden)) or project(hidden)
    )
    serve(runner, {"a": (make_prompt(300), scoring())})
    assert sum(sizes) == 299
    assert max(sizes) == 4
