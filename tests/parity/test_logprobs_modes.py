"""--logprobs-mode on a whole model: the numbers of transformers' own processors on its own logits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.generation import logits_process

from engine import LLM, SamplingParams
from engine.config.engine_config import LOGPROBS_MODES
from engine.config.model_location import bundled_model
from engine.sampling.constraint import Constraint
from engine.sampling.logprobs_mode import IMPOSSIBLE
from engine.scheduling.step_plan import StepPlan, StepRow
from helpers.tiny_models import make_model, save_model
from parity.driving import make_request, make_runner

PROMPT = "The capital of France is"
PARAMS = SamplingParams(
    temperature=0.8, top_k=30, top_p=0.9, min_p=0.01, repetition_penalty=1.2, seed=5, max_tokens=12,
    ignore_eos=True, logprobs=20, prompt_logprobs=3,
)  # fmt: skip
ATOL = 2e-3
"""Logits of the model are up to 20 and agree with those of transformers to 1e-4 of that."""


@pytest.fixture(scope="module")
def theirs():
    return AutoModelForCausalLM.from_pretrained(bundled_model(), dtype=torch.float32)


@pytest.fixture(scope="module", params=LOGPROBS_MODES)
def served(request):
    with LLM(dtype="float32", logprobs_mode=request.param, max_total_tokens=1024) as llm:
        yield request.param, llm


@torch.no_grad()
def expected_scores(model, prompt: list[int], output: list[int], params: SamplingParams, mode: str):
    """Scores [len(output), V] of the positions of the output."""
    logits = model(torch.tensor([prompt + output]), use_cache=False).logits[0].float()
    rows = logits[len(prompt) - 1 : -1]
    if mode.startswith("processed"):
        processors = [logits_process.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)]
        if params.temperature:
            processors += [
                logits_process.TemperatureLogitsWarper(params.temperature),
                logits_process.TopKLogitsWarper(params.top_k),
                logits_process.TopPLogitsWarper(params.top_p),
                logits_process.MinPLogitsWarper(params.min_p),
            ]
        process = logits_process.LogitsProcessorList(processors)
        known = [torch.tensor([prompt + output[:i]]) for i in range(len(output))]
        rows = torch.cat([process(ids, row[None]) for ids, row in zip(known, rows, strict=True)])
    return rows if mode.endswith("logits") else rows.log_softmax(-1)


def test_they_are_those_of_transformers(theirs, served):
    mode, llm = served
    for temperature in (0.8, 0.0):
        params = SamplingParams(**{**_fields(PARAMS), "temperature": temperature})
        (answer,) = llm.generate([PROMPT], params, use_tqdm=False)
        (choice,) = answer.outputs
        ids = choice.token_ids
        expected = expected_scores(theirs, answer.prompt_token_ids, ids, params, mode)
        expected = expected.clamp(min=IMPOSSIBLE).numpy()
        assert len(choice.logprobs) == 12
        for row, (token_id, scores) in enumerate(choice.logprobs):
            assert token_id == ids[row]
            assert scores.token_logprob == pytest.approx(expected[row, token_id], abs=ATOL)
            np.testing.assert_allclose(scores.top_logprobs, expected[row, scores.top_ids], atol=ATOL)
            np.testing.assert_allclose(scores.top_logprobs, -np.sort(-expected[row])[:20], atol=ATOL)
        if mode == "processed_logprobs" and temperature:
            assert any(IMPOSSIBLE in scores.top_logprobs for _, scores in choice.logprobs)


def test_prompts_are_scored_without_any_processing(theirs, served):
    mode, llm = served
    (answer,) = llm.generate([PROMPT], PARAMS, use_tqdm=False)
    prompt = answer.prompt_token_ids
    raw = "raw_logits" if mode.endswith("logits") else "raw_logprobs"
    expected = expected_scores(theirs, prompt[:1], prompt[1:], PARAMS, raw).numpy()
    found = [scores.token_logprob for scores in answer.prompt_logprobs]
    np.testing.assert_allclose(found, expected[np.arange(len(prompt) - 1), prompt[1:]], atol=ATOL)


def _fields(params: SamplingParams) -> dict:
    return {name: getattr(params, name) for name in params.__struct_fields__}


CONSTRAINT = Constraint("regex", "the answer is 42!")


def test_forced_text_is_certain_where_scores_are_processed(served):
    mode, llm = served
    params = SamplingParams(temperature=1, seed=3, max_tokens=40, logprobs=2, constraint=CONSTRAINT)
    (answer,) = llm.generate([PROMPT], params, use_tqdm=False)
    (choice,) = answer.outputs
    assert choice.text == "the answer is 42!" and choice.finish_reason == "stop"
    if mode == "processed_logprobs":
        assert [scores.token_logprob for _, scores in choice.logprobs] == [0.0] * len(choice.logprobs)
        assert {scores.top_logprobs[1] for _, scores in choice.logprobs} == {IMPOSSIBLE}


def test_a_forced_stop_token_is_hidden_like_any_other():
    """The same answer whether the end was forced along with the text, or drawn after it."""
    answers = {True: [], False: []}
    for off in (False, True):
        with LLM(disable_jump_forward=off, max_total_tokens=1024) as llm:
            for shown, logprobs in itertools.product((True, False), (None, 2)):
                params = SamplingParams(
                    temperature=0, max_tokens=40, constraint=CONSTRAINT, logprobs=logprobs,
                    skip_special_tokens=not shown, include_stop=shown,
                )  # fmt: skip
                (answer,) = llm.generate([PROMPT], params, use_tqdm=False)
                answers[shown] += answer.outputs
    for shown, outputs in answers.items():
        end = outputs[0].text.removeprefix("the answer is 42!")
        assert bool(end) == shown
        assert len({(a.text, tuple(a.token_ids), a.finish_reason, a.matched_stop) for a in outputs}) == 1
        forced, drawn = outputs[1].logprobs, outputs[3].logprobs
        assert forced == drawn
        assert len(drawn) == len(outputs[0].token_ids) - (not shown)


# --- more alternatives than tokens


def test_a_small_vocabulary_has_few_alternatives(tmp_path):
    runner = make_runner(save_model(make_model("llama3", vocab_size=12), tmp_path))
    request = make_request([3, 4, 5, 6])
    request.params = SamplingParams(logprobs=20, prompt_logprobs=20)
    row = StepRow(request, 0, 4, True, scored=range(3))
    result = runner.execute(StepPlan([row]))
    assert sorted(result.top_ids[0].tolist()) == list(range(12))
    assert np.exp(result.top_logprobs[0]).sum() == pytest.approx(1)
    (scores,) = result.scores
    assert scores.top_ids.shape == (3, 12)
    np.testing.assert_allclose(np.exp(scores.top_logprobs).sum(axis=1), 1, rtol=1e-5)
