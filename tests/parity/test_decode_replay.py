"""Steps that are replayed natively against the same steps op by op."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from engine.adapters.adapter_pool import PoolEntry
from engine.errors import NativeError
from engine.models.embedding_head import EmbeddingHead
from engine.models.embedding_spec import EmbeddingSpec
from engine.ops import native
from engine.runner import decode_replay
from engine.runner.decoder_embedder import DecoderEmbedder
from engine.scheduling.request import Request
from engine.scheduling.step_plan import StepPlan, StepRow
from helpers.adapters import MODULES, make_adapter, save_adapter
from helpers.tiny_models import WINDOW, make_model, save_model
from parity.driving import BLOCK_SIZE, make_request, make_runner, step_logits

PROMPTS = [[5, 9, 2], [7 * i % 50 for i in range(WINDOW + 6)], [3, 1]]
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


def answers(runner, between: Callable[[], object] = lambda: None) -> list[torch.Tensor]:
    """Logits of every step of `TURNS`, with something else before each."""
    requests, steps = prefilled(runner), []
    for turn in TURNS:
        between()
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
    ("kind", "is_replayed"),
    [("llama", True), ("mistral", True), ("qwen3", True), ("gemma2", False), ("mixtral", False)],
)
@pytest.mark.parametrize(
    "options",
    [{}, {"quantization": "int8"}, {"quantization": "int4"}, {"dtype": "bfloat16", "kv_cache_dtype": "int8"}],
    ids=["float32", "int8", "int4", "int8 cache"],
)
def test_a_replayed_step_has_the_same_bits(tmp_path, monkeypatch, kind, is_replayed, options):
    runner = make_runner(save_model(make_model(kind), tmp_path), **options)
    monkeypatch.setattr(runner._replay, "_can_record", False)
    expected = answers(runner)
    assert recorded(runner) == []
    monkeypatch.setattr(runner._replay, "_can_record", True)
    for _ in range(2):
        assert all(map(torch.equal, answers(runner), expected))
    assert sorted(recorded(runner)) == ([(1, 1), (2, 2), (2, 4), (3, 3)] if is_replayed else [])


def test_what_runs_between_replays_leaves_them_alone(tmp_path):
    """A prompt and a decode step with an adapter, and texts that are embedded."""
    model = make_model("qwen3")
    runner = make_runner(save_model(model, tmp_path / "base"), max_lora_rank=8)
    expected = answers(runner)
    adapter_path = save_adapter(make_adapter(model, MODULES, rank=8, seed=1), tmp_path / "adapter")
    adapted = make_request([4, 8, 6])
    adapted.block_table, adapted.num_blocks = adapted.block_table[40:], 5
    adapted.adapter = PoolEntry(None, runner.adapter_reader.load(adapter_path).weights)
    head = EmbeddingHead(
        EmbeddingSpec(pooling=("mean",), is_normalized=True),
        runner.spec.hidden_size,
        ops=native,
        ctx=runner.context,
    )
    sizes = {"block_size": BLOCK_SIZE, "max_tokens": 64, "max_len": 64}
    embedder = DecoderEmbedder(runner.model, runner.spec, head, dtype="float32", **sizes)
    seen = []

    def between() -> None:
        adapted.num_computed = 0
        logits = step_logits(runner, adapted, 2), step_logits(runner, adapted, 1)
        work = embedder.compute([np.arange(3, 30, dtype=np.int32)] * 2, [27, 27], [None, None])
        with pytest.raises(StopIteration) as end:
            while True:
                next(work)
        seen.append((*logits, torch.from_numpy(end.value.value)))

    assert all(map(torch.equal, answers(runner, between), expected))
    assert len(recorded(runner)) == 4
    adapted.adapter = None
    adapted.num_computed = 0
    assert not torch.equal(step_logits(runner, adapted, 2), seen[0][0]), "the adapter changes nothing"
    for results in seen:
        assert all(map(torch.equal, results, seen[0]))


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


def test_watching_torch_does_not_import_its_compiler():
    """That would be a second of the first decode step of every engine, and a hundred megabytes."""
    lines = (
        "import sys, torch",
        "from engine.runner.decode_replay import _TorchWatch",
        "with _TorchWatch() as watch: torch.arange(3)[1:]",
        "assert watch.has_computed",
        "sys.exit('torch._dynamo' in sys.modules)",
    )
    assert subprocess.run([sys.executable, "-c", "\n".join(lines)]).returncode == 0
