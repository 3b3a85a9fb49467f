"""Speculative decoding on and off: the same answers to the last bit, whatever is asked of sampling."""

from __future__ import annotations

import json
import random

import pytest

from engine import LLM, SamplingParams
from engine.sampling.constraint import Constraint, Thinking
from helpers.guessing import Oracle
from helpers.random_schemas import random_schema

PASSAGE = "The committee met on Tuesday to discuss the budget for the next year, and it decided to wait. "
PROMPTS = ("Say it again. " + PASSAGE * 2, "1 2 3 4 1 2 3 4 1 2", "Hello, who are you?", "{", " " * 40)
WORDS = ["The committee has decided to accept.", "The committee has decided to wait.", "No."]
NAMES = {
    "type": "array",
    "items": {"type": "object", "properties": {"name": {"enum": ["Ann", "Bob"]}, "n": {"type": "integer"}}},
    "minItems": 3,
    "maxItems": 9,
}
CONSTRAINTS = [
    Constraint("choice", json.dumps(WORDS)),
    Constraint("json_schema", json.dumps(NAMES)),
    Constraint("regex", r"(ab|cd){3,40}-[0-9]{2}(-suffix)?"),
    Constraint("ebnf", 'root ::= "begin " ("x y " | "x z ")+ " end of it"'),
    Constraint("json_object"),
    *(Constraint("json_schema", json.dumps(random_schema(seed))) for seed in range(300, 310)),
]
FEW_BLOCKS = {"max_total_tokens": 320, "max_running_requests": 12, "debug_checks": True}


@pytest.fixture(scope="module", params=[{}, {"disable_jump_forward": True}], ids=["jumps", "steps"])
def engines(request):
    """Without and with speculation, with few blocks, so that requests are preempted."""
    options = FEW_BLOCKS | request.param
    with LLM(**options) as plain, LLM(**options, speculative="ngram") as speculative:
        yield plain, speculative


def drawn_request(draw: random.Random) -> tuple[str, SamplingParams, str | None]:
    is_greedy = draw.random() < 0.5
    max_tokens = draw.choice([1, 2, 20, 60, 120])
    constraint = draw.choice([None, None, *CONSTRAINTS]) if draw.random() < 0.5 else None
    thinking = None
    if draw.random() < 0.15:
        thinking = Thinking(
            end=(draw.choice([300, 16, 14]),), budget=draw.choice([None, 9]), closing=(300, 16)
        )
    params = SamplingParams(
        temperature=0.0 if is_greedy else draw.choice([0.3, 1.0]),
        top_p=draw.choice([1.0, 0.8]),
        top_k=draw.choice([-1, 5]),
        min_p=draw.choice([0.0, 0.1]),
        seed=draw.randrange(1000),
        max_tokens=max_tokens,
        min_tokens=draw.choice([0, max_tokens // 2]),
        logprobs=draw.choice([None, 0, 3]),
        prompt_logprobs=draw.choice([None, None, 2]),
        frequency_penalty=draw.choice([0.0, 0.0, -0.5, 0.3]),
        presence_penalty=draw.choice([0.0, 0.0, 0.4]),
        repetition_penalty=draw.choice([1.0, 1.0, 0.9, 1.1]),
        logit_bias=draw.choice([{}, {}, {300: 3.0, 301: -100.0}]),
        stop=draw.choice([(), (), ("me",), ("al", "}"), ("decided to",)]),
        stop_token_ids=draw.choice([(), (), (300, 19, 20)]),
        include_stop=draw.random() < 0.3,
        ignore_eos=draw.random() < 0.5,
        constraint=constraint,
        thinking=thinking,
    )
    return draw.choice(PROMPTS), params, draw.choice([None, None, "pirate", "uppercase"])


def answers(llm: LLM, requests: list[tuple[str, SamplingParams, str | None]], n: int) -> list:
    prompts, params, adapters = map(list, zip(*requests, strict=True))
    outputs = llm.generate(prompts, params, n=n, lora_path=adapters, use_tqdm=False)
    return [(output.prompt_logprobs, output.outputs) for output in outputs]


def texts(llm: LLM, requests: list, served: list) -> list[list[int]]:
    """Prompts with their answers, as token ids."""
    return [
        llm.tokenizer.encode(prompt) + choice.token_ids
        for (prompt, _, _), (_, choices) in zip(requests, served, strict=True)
        for choice in choices
    ]


@pytest.mark.parametrize("seed", range(2))
def test_both_ways_give_the_same_answers(engines, seed):
    plain, speculative = engines
    draw = random.Random(seed)
    requests = [drawn_request(draw) for _ in range(30)]
    n = 1 + seed % 2
    assert answers(speculative, requests, n) == answers(plain, requests, n)


@pytest.mark.parametrize("error_rate", [0.0, 0.3])
def test_guesses_right_and_wrong_at_every_place(engines, monkeypatch, error_rate):
    """What is guessed here reaches into forced text, stop strings, the end of thoughts and of answers."""
    plain, speculative = engines
    draw = random.Random(int(error_rate * 10) + 40)
    requests = [drawn_request(draw) for _ in range(30)]
    expected = answers(plain, requests, 2)
    oracle = Oracle(texts(plain, requests, expected), error_rate, vocab_size=500, seed=5)
    oracle.install(monkeypatch)
    assert answers(speculative, requests, 2) == expected
    assert oracle.num_right > 100
    assert oracle.num_cut_short > 20 or not error_rate


@pytest.mark.parametrize("pattern", ["[a-d]{12}", "a{9}[bc]d{9}[ef]", "(ab|cd){5} end"])
def test_an_answer_without_a_stop_token_ends_within_a_guess(engines, monkeypatch, pattern):
    plain, speculative = engines
    params = SamplingParams(
        seed=1, max_tokens=60, ignore_eos=True, logprobs=1, constraint=Constraint("regex", pattern)
    )
    requests = [(prompt, params, None) for prompt in PROMPTS]
    expected = answers(plain, requests, 2)
    oracle = Oracle(texts(plain, requests, expected), 0.0, vocab_size=500, seed=5)
    oracle.install(monkeypatch)
    for _ in range(3):
        assert answers(speculative, requests, 2) == expected
    assert all(choice.finish_reason == "stop" for _, choices in expected for choice in choices)
    assert oracle.num_right > 20


def test_there_are_guesses_refusals_and_preemptions(engines):
    """The comparisons above compare something."""
    plain, speculative = engines
    for engine in engines:
        params = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
        engine.generate(PROMPTS * 6, params, use_tqdm=False)
    before, after = plain._core.stats(), speculative._core.stats()
    assert before.draft_tokens == 0 and before.num_preemptions > 0 and after.num_preemptions > 0
    assert 0 < after.accepted_tokens < after.draft_tokens
    assert after.num_steps < before.num_steps


def test_usage_and_the_cache_are_the_same():
    """One after the other, so that the cache holds the same prompts for both, and answers as well."""
    draw = random.Random(7)
    with LLM() as plain, LLM(speculative="ngram") as speculative:
        for _ in range(25):
            prompt, params, adapter = drawn_request(draw)
            first, second = (
                engine.generate([prompt], params, lora_path=adapter, use_tqdm=False)[0]
                for engine in (plain, speculative)
            )
            assert first == second
            goes_on = first.prompt_token_ids + first.outputs[0].token_ids
            params = SamplingParams(temperature=0, max_tokens=5)
            first, second = (
                engine.generate([goes_on], params, lora_path=adapter, use_tqdm=False)[0]
                for engine in (plain, speculative)
            )
            assert first == second and first.num_cached_tokens == second.num_cached_tokens


def test_a_processed_mode_of_log_probabilities():
    """Their forced tokens are drawn one by one."""
    options = {"logprobs_mode": "processed_logprobs"}
    draw = random.Random(8)
    requests = [drawn_request(draw) for _ in range(20)]
    with LLM(**options) as plain, LLM(**options, speculative="ngram") as speculative:
        assert answers(speculative, requests, 1) == answers(plain, requests, 1)
