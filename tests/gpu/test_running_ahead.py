"""Steps that are launched while the one before runs, on a GPU."""

from __future__ import annotations

import json

import pytest
import torch

from engine import LLM, SamplingParams
from engine.sampling.constraint import Constraint
from gpu.test_models import gpu_options
from helpers.tiny_models import make_model, save_model
from parity.test_device_path import answers_of
from parity.test_p1 import Machine, make_mix

pytestmark = pytest.mark.gpu


@pytest.fixture
def directory(tmp_path):
    return save_model(make_model("mistral").bfloat16(), tmp_path)


@pytest.mark.parametrize("graphs", [True, False])
def test_answers_are_those_of_steps_that_wait(directory, graphs):
    """With penalties, preemption, chunks of prompts, stop tokens and `--deterministic`."""
    runner = Machine(directory, **gpu_options("bfloat16", graphs=graphs, deterministic=True)).runner
    ahead, waiting = (answers_of(runner, make_mix(), runs_ahead=way) for way in (True, False))
    assert ahead == waiting and len(ahead) > 20


def test_no_launch_waits_for_the_device(directory):
    """torch raises for each copy or question that would; the first time, kernels may still be compiled."""
    runner = Machine(directory, **gpu_options("bfloat16", graphs=False)).runner
    mix = make_mix()
    answers_of(runner, mix, runs_ahead=True)
    launch, waits = runner.launch, []

    def watched(plan, before_draws=None):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(plan, before_draws)
        except RuntimeError as error:
            waits.append(error)
            raise
        finally:
            torch.cuda.set_sync_debug_mode("default")

    runner.launch = watched
    answers_of(runner, mix, runs_ahead=True)
    assert not waits


SCHEMA = {"type": "array", "items": {"enum": ["Ann", "Bob"]}, "minItems": 2, "maxItems": 4}


def test_constrained_answers_and_those_beside_them_are_those_of_steps_that_wait():
    """Masks are sent when the model has been launched; what a schema forces overtakes rows that run."""
    constraint = Constraint("json_schema", json.dumps(SCHEMA))
    params = [
        SamplingParams(temperature=0.0, max_tokens=24, constraint=constraint if index % 2 else None)
        for index in range(6)
    ]
    prompts = ["Say it.", "Names:", "Once upon a time", "Who?", "1 2 3", "A list"]
    found = []
    for waits in (False, True):
        options = {"deterministic": True, "disable_overlap_schedule": waits, "max_total_tokens": 2048}
        with LLM(device="cuda", context_length=256, max_running_requests=8, **options) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        found.append([output.outputs[0].text for output in outputs])
    assert found[0] == found[1]
    assert all(2 <= len(json.loads(text)) <= 4 for text in found[0][1::2])
