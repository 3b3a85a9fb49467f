"""Steps that are replayed natively against the same steps op by op."""

from __future__ import annotations

import pytest
import torch

from engine.errors import NativeError
from engine.runner import decode_replay
from engine.scheduling.request import Request
from engine.scheduling.step_plan import StepPlan, StepRow
from helpers.tiny_models import make_model, save_model
from parity.driving import make_request, make_runner

PROMPTS = [[5, 9, 2], [7] * 40, [3, 1]]
TURNS = [(0,), (0, 1), (0,), (1,), (0, 1), (0, 1, 2), (2, 0), (2,), (0, 1, 2), (1, 1, 1, 2), (2, 2, 2, 1)]
"""Which requests decode together; one that is named again goes on with guesses, all of them right."""


def prefilled(runner) -> list[Request]:
    requests = [make_request(prompt) for prompt in PROMPTS]
    for number, request in enumerate(requests):
        request.block_table = request.block_table[10 * number :]  # blocks of its own
        request.num_blocks = 5
        runner.compute_logits(StepPlan([StepRow(request, 0, request.num_known, True)]))
        request.num_computed = request.num_known
    return requests


def answers(runner) -> list[torch.Tensor]:
    """Logits of every step of `TURNS`."""
    requests, steps = prefilled(runner), []
    for turn in TURNS:
        rows = []
        for number in dict.fromkeys(turn):
            request, count = requests[number], turn.count(number)
            for _ in range(count):
                request.token_ids[request.num_known] = 11 * (number + request.num_known) % 50
                request.num_known += 1
            rows.append(StepRow(request, request.num_computed, count, True, num_drafts=count - 1))
        steps.append(runner.compute_logits(StepPlan(rows)).clone())
        assert len(steps[-1]) == len(turn)
        for row in rows:
            row.request.num_computed += row.num_tokens
    return steps


def recorded(runner) -> list[tuple[int, int]]:
    return list(runner._replay._recorded)


@pytest.mark.parametrize(
    ("kind", "is_replayed"), [("llama", True), ("qwen3", True), ("gemma2", False), ("mixtral", False)]
)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_replayed_step_has_the_same_bits(tmp_path, monkeypatch, kind, is_replayed, dtype):
    directory = save_model(make_model(kind), tmp_path)
    options = {"quantization": "int8"} if dtype == "int8" else {}
    runner = make_runner(directory, **options)
    monkeypatch.setattr(runner._replay, "_can_record", False)
    expected = answers(runner)
    assert recorded(runner) == []
    monkeypatch.setattr(runner._replay, "_can_record", True)
    for _ in range(2):
        assert all(map(torch.equal, answers(runner), expected))
    assert sorted(recorded(runner)) == ([(1, 1), (2, 2), (2, 4), (3, 3)] if is_replayed else [])


@pytest.mark.parametrize("drawing", [(True, False, True), (False, True, True), (False, False, False)])
def test_rows_that_draw_nothing_are_replayed_with_the_others(tmp_path, monkeypatch, drawing):
    """As behind tokens that a constraint forces."""
    runner = make_runner(save_model(make_model("llama"), tmp_path))
    logits = []
    for can_record in (False, True, True):
        monkeypatch.setattr(runner._replay, "_can_record", can_record)
        rows = []
        for request, draws in zip(prefilled(runner), drawing, strict=True):
            request.token_ids[request.num_known] = 11
            request.num_known += 1
            rows.append(StepRow(request, request.num_computed, 1, draws))
        logits.append(runner.compute_logits(StepPlan(rows)).clone())
        assert len(logits[-1]) == sum(drawing)
        assert torch.equal(logits[0], logits[-1])
    assert (3, 3) in recorded(runner)


def test_a_replay_calls_no_python(tmp_path, monkeypatch):
    runner = make_runner(save_model(make_model("llama"), tmp_path))
    expected = answers(runner)
    monkeypatch.setattr(runner._replay, "_forward", None)  # prompts go another way
    request = make_request(PROMPTS[1])
    with pytest.raises(TypeError):
        runner.compute_logits(StepPlan([StepRow(request, 0, request.num_known, True)]))
    request.num_computed = request.num_known - 1
    assert runner.compute_logits(StepPlan([StepRow(request, request.num_computed, 1, True)])).shape[0] == 1
    assert len(expected) == len(TURNS)


def test_recordings_are_few(tmp_path, monkeypatch):
    monkeypatch.setattr(decode_replay, "MOST_RECORDINGS", 2)
    runner = make_runner(save_model(make_model("llama"), tmp_path))
    expected = answers(runner)
    assert recorded(runner) == [(3, 3), (2, 4)]
    assert all(map(torch.equal, answers(runner), expected))


def test_inputs_that_lie_elsewhere_are_not_mistaken(tmp_path):
    runner, other = (make_runner(save_model(make_model("llama"), tmp_path)) for _ in range(2))
    expected = answers(runner)
    runner._inputs = other._inputs
    assert all(map(torch.equal, answers(runner), expected))


def test_a_failed_step_ends_its_recording(tmp_path):
    runner = make_runner(save_model(make_model("llama"), tmp_path))
    request = make_request([5, 6])
    request.block_table[:] = 10**6
    for _ in range(2):
        with pytest.raises(NativeError):
            runner.compute_logits(StepPlan([StepRow(request, 0, 1, True)]))
    assert recorded(runner) == []
    assert len(answers(runner)) == len(TURNS)
    with pytest.raises(NativeError, match="slot_ids"):
        runner.compute_logits(StepPlan([StepRow(request, 0, 1, True)]))  # replayed
    assert recorded(runner)[-1] == (1, 1)
