"""Forced text computed at once or token by token: the same answers, to the last bit."""

from __future__ import annotations

import json
import random

import pytest

from engine import LLM, SamplingParams
from engine.sampling.constraint import Constraint
from helpers.random_schemas import random_schema

PROMPTS = ("Give me JSON: ", "A list of colors, sizes and names follows, as it was agreed: ", "{", " " * 40)
LONG_CHOICES = ["The committee has decided to accept.", "The committee has decided to wait.", "No."]
FIXED = {
    "type": "object",
    "properties": {
        "a long name that is always the same": {"const": "and a long value, which is always the same too"},
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["a long name that is always the same", "n"],
}
CONSTRAINTS = [
    Constraint("choice", json.dumps(LONG_CHOICES)),
    Constraint("choice", json.dumps(["There is only one answer to this question."])),
    Constraint("json_schema", json.dumps(FIXED)),
    Constraint("regex", r"prefix-[a-z]{2}-middle-[0-9]{2}(-suffix)?"),
    Constraint("regex", r"[à-ü]{2}日本語(テスト|テキスト)"),
    Constraint("ebnf", 'root ::= "begin " ("x" | "y ")+ " end of it"'),
    Constraint("json_object"),
    *(Constraint("json_schema", json.dumps(random_schema(seed))) for seed in range(300, 330)),
    None,
]


@pytest.fixture(scope="module", params=["auto", "dummy"], ids=["bundled", "random"])
def engines(request):
    """With and without the shortcut, with few blocks, so that requests are preempted.

    The bundled model, and one of its shape with random weights.
    """
    options = {"max_total_tokens": 256, "max_running_requests": 12, "debug_checks": True}
    options["load_format"] = request.param
    with LLM(**options) as shortcut, LLM(**options, disable_jump_forward=True) as plain:
        yield shortcut, plain


def drawn_request(draw: random.Random) -> tuple[str, SamplingParams]:
    params = SamplingParams(
        temperature=draw.choice([0.0, 1.0, 1.0]),
        seed=draw.randrange(1000),
        max_tokens=draw.choice([0, 1, 5, 20, 120]),
        min_tokens=0,
        logprobs=draw.choice([None, 0, 3]),
        prompt_logprobs=draw.choice([None, None, 2]),
        frequency_penalty=draw.choice([0.0, 0.5]),
        repetition_penalty=draw.choice([1.0, 1.2]),
        stop=draw.choice([(), (), ("me",), ("al", "}"), ("decided to",)]),
        stop_token_ids=draw.choice([(), (), (300, 19, 20)]),
        include_stop=draw.random() < 0.3,
        ignore_eos=draw.random() < 0.3,
        constraint=draw.choice(CONSTRAINTS),
    )
    return draw.choice(PROMPTS), params


def answers(llm: LLM, requests: list[tuple[str, SamplingParams]], n: int) -> list:
    prompts, params = zip(*requests, strict=True)
    outputs = llm.generate(list(prompts), list(params), n=n, use_tqdm=False)
    return [(output.prompt_logprobs, output.outputs) for output in outputs]


@pytest.mark.parametrize("seed", range(3))
def test_both_ways_give_the_same_answers(engines, seed):
    draw = random.Random(seed)
    requests = [drawn_request(draw) for _ in range(40)]
    n = 1 + seed % 3
    assert answers(engines[0], requests, n) == answers(engines[1], requests, n)


def test_there_is_forced_text_and_preemption(engines):
    """The comparison above compares something."""
    num_steps, num_preemptions = [], []
    for engine in engines:
        before = engine._core.stats().num_steps
        params = SamplingParams(max_tokens=100, constraint=Constraint("json_schema", json.dumps(FIXED)))
        engine.generate(["x"] * 12, params, use_tqdm=False)
        num_steps.append(engine._core.stats().num_steps - before)
        params = SamplingParams(max_tokens=100, ignore_eos=True, constraint=Constraint("regex", "[0-9]{90}"))
        engine.generate(["x"] * 12, params, use_tqdm=False)
        num_preemptions.append(engine._core.stats().num_preemptions)
    assert num_steps[0] < 0.5 * num_steps[1]
    assert min(num_preemptions) > 0


def test_usage_is_the_same():
    """One after the other, so that the cache holds the same prompts for both."""
    draw = random.Random(7)
    with LLM() as shortcut, LLM(disable_jump_forward=True) as plain:
        for _ in range(40):
            prompt, params = drawn_request(draw)
            answers = [engine.generate([prompt], params, use_tqdm=False)[0] for engine in (shortcut, plain)]
            assert answers[0].num_cached_tokens == answers[1].num_cached_tokens
