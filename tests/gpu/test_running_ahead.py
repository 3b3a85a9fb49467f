"""Steps that are launched while the one before runs, on a GPU."""

from __future__ import annotations

import pytest
import torch

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

    def watched(plan):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(plan)
        except RuntimeError as error:
            waits.append(error)
            raise
        finally:
            torch.cuda.set_sync_debug_mode("default")

    runner.launch = watched
    answers_of(runner, mix, runs_ahead=True)
    assert not waits
