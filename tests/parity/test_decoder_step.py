"""What a step of the decoder costs besides the kernels."""

from __future__ import annotations

from collections import Counter

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from engine.scheduling.step_plan import StepPlan, StepRow
from helpers.tiny_models import make_model, save_model
from parity.driving import make_request, make_runner


class CountingMode(TorchDispatchMode):
    """Counts the torch operators that run."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_layers_use_no_torch_operator(tmp_path, kind):
    """Every torch operator of a step runs once a step: layers neither allocate nor slice."""
    counts = []
    for num_layers in (1, 4):
        directory = save_model(make_model(kind, num_hidden_layers=num_layers), tmp_path / str(num_layers))
        runner = make_runner(directory)
        rows = [StepRow(make_request([5] * 20), 0, 20, True), StepRow(make_request([6]), 0, 1, True)]
        with CountingMode() as mode:
            runner.execute(StepPlan(rows))
        counts.append(mode.counts)
    assert counts[0] == counts[1]
    assert 0 < sum(counts[0].values()) < 60


def test_a_step_without_samples_has_no_logits(tmp_path):
    runner = make_runner(save_model(make_model("llama"), tmp_path))
    request = make_request([5] * 20)
    plan = StepPlan([StepRow(request, 0, 12, False)])
    assert runner.compute_logits(plan).shape[0] == 0
    assert runner.execute(plan).token_ids.tolist() == []
