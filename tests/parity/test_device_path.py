"""The path of a GPU on CPU tensors: the same decoder with its placement, its plan and its graphs."""

from __future__ import annotations

import types

import msgspec
import numpy as np
import pytest
import torch

from engine.cache.prefix_cache import PrefixCache
from engine.core.engine_core import EngineCore
from engine.core.messages import GenerateRequest, TokenChunk
from engine.errors import DeviceLost
from engine.ops.cuda import matrix
from engine.ops.placement import on_gpu
from engine.runner.decode_graphs import Captured
from engine.scheduling import scheduler
from engine.scheduling.settings import SchedulerSettings
from engine.scheduling.step_plan import StepPlan, StepRow
from helpers import device_ops
from helpers.tiny_models import KINDS, VOCAB_SIZE, load_model, make_model, save_model
from parity.driving import NUM_BLOCKS, generate, make_request, make_runner
from parity.test_p1 import CONTEXT_LENGTH, FEW_BLOCKS, MAX_RUNNING, Answers, Machine, make_mix
from parity.test_transformers import TOLERANCE, make_prompt, their_greedy, their_logits, worst_error

LENGTH, NUM_TOKENS = 80, 24


def device_runner(directory, dtype="float32", **options):
    return make_runner(directory, dtype=dtype, ops=device_ops, placement=on_gpu(dtype, "cpu"), **options)


class FakeGraphs:
    """Captures a function by keeping it; counts what is captured and replayed."""

    def __init__(self) -> None:
        self.num_captured = self.num_replayed = 0

    def __call__(self, run):
        hidden, self.num_captured = run(), self.num_captured + 1

        def replay():
            self.num_replayed += 1
            assert run().data_ptr() == hidden.data_ptr(), "results stay where they were"

        return Captured(replay, hidden, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_transformers(kind, tmp_path):
    model = make_model(kind)
    graphs = FakeGraphs()
    runner = device_runner(save_model(model, tmp_path), capture=graphs)
    prompt = make_prompt(LENGTH)
    tokens, logits = generate(runner, prompt, NUM_TOKENS, chunk=37)
    assert tokens == their_greedy(model, prompt)[:NUM_TOKENS]
    assert worst_error(logits, their_logits(model, prompt, tokens)) <= TOLERANCE
    assert graphs.num_captured == 1 and graphs.num_replayed >= NUM_TOKENS - 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss", "qwen3_moe"])
def test_half_precision_error_is_no_larger_than_theirs(kind, dtype, tmp_path):
    """Sums here are exact and theirs are not; both round rows between layers to the dtype.

    The median row: where experts are, a rounding sends some rows elsewhere, ours or theirs.
    """
    save_model(make_model(kind).to(getattr(torch, dtype)), tmp_path)
    prompt = make_prompt(200)
    tokens, ours = generate(device_runner(tmp_path, dtype), prompt, NUM_TOKENS)
    theirs, exact = (
        their_logits(load_model(tmp_path, kind), prompt, tokens)
        for kind in (getattr(torch, dtype), torch.float32)
    )
    our_error, their_error = ((logits - exact).square().mean(-1) for logits in (ours, theirs))
    assert 0 < our_error.median() <= their_error.median()


def test_an_fp8_cache_rounds_and_no_more(tmp_path):
    """Its numbers have 4 bits of precision where bfloat16 has 8: 16 times the error, within a factor of 2."""
    directory = save_model(make_model("llama"), tmp_path)
    logits = {
        kind: generate(device_runner(directory, kv_cache_dtype=kind), make_prompt(200), 1)[1]
        for kind in ("float32", "bfloat16", "fp8")
    }
    fp8, bfloat16 = ((logits[kind] - logits["float32"]).norm() for kind in ("fp8", "bfloat16"))
    assert 8 <= fp8 / bfloat16 <= 32


def test_rows_that_fill_up_a_step_touch_no_block_of_a_request(tmp_path):
    """Three rows run in a graph of four; NaN in all other blocks must not be read, nor written over."""
    graphs = FakeGraphs()
    runner = device_runner(save_model(make_model("llama"), tmp_path), capture=graphs)
    lengths, num_steps = (5, 17, 40), 6
    requests = [make_request(make_prompt(length)) for length in lengths]
    for index, request in enumerate(requests):
        request.block_table = np.arange(16 * index, 16 * index + 16, dtype=np.int32)
        request.num_blocks = 16
    for layer in runner.kv_cache.layers:
        layer.keys.fill_(float("nan"))
        layer.values.fill_(float("nan"))
    runner.execute(StepPlan([StepRow(request, 0, request.num_known, True) for request in requests]))
    for request, length in zip(requests, lengths, strict=True):
        request.num_computed = length
    for _ in range(num_steps):
        for request in requests:
            request.token_ids[request.num_known] = 7
            request.num_known += 1
        plan = StepPlan([StepRow(request, request.num_computed, 1, True) for request in requests])
        assert (runner.execute(plan).token_ids >= 0).all()
        for request in requests:
            request.num_computed += 1
    assert graphs.num_captured == 1 and graphs.num_replayed == num_steps - 1
    written = torch.zeros(NUM_BLOCKS + 1, dtype=torch.bool)
    written[runner.kv_cache.layers[0].keys.isfinite().flatten(1).any(1)] = True
    num_own = [-(-(length + num_steps) // 16) for length in lengths]
    own = {16 * index + block for index, count in enumerate(num_own) for block in range(count)}
    assert set(written.nonzero().flatten().tolist()) == own | {NUM_BLOCKS}


def test_a_lost_gpu_is_told_from_a_step_that_failed(tmp_path, monkeypatch):
    runner = device_runner(save_model(make_model("llama"), tmp_path))
    plan = StepPlan([StepRow(make_request([5, 6]), 0, 2, True)])

    def fail(*arguments):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    monkeypatch.setattr(device_ops, "paged_attention", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        runner.execute(plan)
    runner.context.is_lost = True
    with pytest.raises(DeviceLost, match="computes nothing more for this process: CUDA error: an illegal"):
        runner.execute(plan)


def matrix_ops() -> types.SimpleNamespace:
    """The references with the CUDA backend's own matrices and products, which torch computes; experts one by
    one, as those that are not alike."""

    def embedding(ctx, token_ids, weight, out):
        out.copy_(weight.weight[token_ids.long()])

    own = {"PackedMatrix": matrix.PackedMatrix, "linear": matrix.linear}
    others = {name: getattr(device_ops, name) for name in device_ops.__all__ if name != "experts"}
    return types.SimpleNamespace(**(others | own | {"embedding": embedding}))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3_moe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_the_matrices_of_the_backend(kind, dtype, tmp_path):
    save_model(make_model(kind).to(getattr(torch, dtype)), tmp_path)
    prompt = make_prompt(100)
    options = {"dtype": dtype, "placement": on_gpu(dtype, "cpu")}
    tokens, ours = generate(make_runner(tmp_path, ops=matrix_ops(), **options), prompt, 8)
    theirs, exact = (
        their_logits(load_model(tmp_path, kind), prompt, tokens)
        for kind in (getattr(torch, dtype), torch.float32)
    )
    if dtype == "float32":
        assert worst_error(ours, exact) <= TOLERANCE
    else:
        our_error, their_error = ((x - exact).square().mean(-1).median() for x in (ours, theirs))
        assert 0 < our_error <= 2 * their_error


def test_a_mix_is_answered_as_on_the_cpu(tmp_path):
    """Shared prefixes, chunks, preemption, penalties, filters, scores and graphs: the same tokens."""
    save_model(make_model("mistral"), tmp_path)
    mix = make_mix()[::2]
    graphs = FakeGraphs()
    placed = {"ops": device_ops, "placement": on_gpu("float32", "cpu"), "capture": graphs}
    answers, expected = (
        Machine(tmp_path, dtype="float32", **options).answer([mix], chunk=64, num_blocks=FEW_BLOCKS)
        for options in (placed, {})
    )
    assert tokens_of(answers) == tokens_of(expected)
    assert expected.num_preemptions == answers.num_preemptions > 0 and graphs.num_replayed > 10


def test_ids_that_only_the_device_knows_reach_the_next_step_and_its_penalties(tmp_path, monkeypatch):
    """A mix whose steps are launched before the tokens of the one before are known: the CPU's tokens. Where
    they go the host has another id. Penalties, graphs, preemption and chunks of prompts are in it."""
    save_model(make_model("mistral"), tmp_path)
    mix = make_mix()[1::2]
    graphs = FakeGraphs()
    device = Machine(
        tmp_path, dtype="float32", ops=device_ops, placement=on_gpu("float32", "cpu"), capture=graphs
    ).runner
    launch, num_late, num_penalised = device.launch, 0, 0

    def watched(plan):
        nonlocal num_late, num_penalised
        late = [row for row in plan.rows if row.is_ahead]
        assert all(row.request.token_ids[row.start] == 7 for row in late)
        num_late += len(late)
        num_penalised += sum(row.request.params.repetition_penalty != 1 for row in late)
        return launch(plan)

    device.launch = watched
    monkeypatch.setattr(scheduler, "with_room", room_of_sevens)
    ahead = answers_of(device, mix, runs_ahead=True)
    waiting = answers_of(Machine(tmp_path, dtype="float32").runner, mix, runs_ahead=False)
    assert ahead == waiting and len(ahead) > 10
    assert num_late > 200 and num_penalised > 40 and graphs.num_replayed > 10


def test_masks_may_come_when_the_model_is_launched(tmp_path):
    runner = device_runner(save_model(make_model("llama"), tmp_path))
    plan = StepPlan([StepRow(make_request([5, 6, 7]), 0, 3, True)])
    free = runner.execute(plan).token_ids.tolist()
    only = np.zeros((1, -(-VOCAB_SIZE // 32)), np.int32)
    only[0, 1] = 1 << 9
    launched = []

    def fill():
        launched.append(runner.kv_cache.layers[-1].keys.abs().sum().item())
        plan.bitmask = only

    for layer in runner.kv_cache.layers:
        layer.keys.zero_()
    assert runner.launch(plan, before_draws=fill)().token_ids.tolist() == [41] != free
    assert launched[0] > 0, "all layers were computed by then"


def room_of_sevens(prompt, capacity):
    token_ids = np.full(capacity, 7, np.int32)
    token_ids[: len(prompt)] = prompt
    return token_ids


def answers_of(runner, mix, *, runs_ahead: bool) -> dict:
    settings = SchedulerSettings(
        context_length=CONTEXT_LENGTH,
        vocab_size=VOCAB_SIZE,
        max_running_requests=MAX_RUNNING,
        max_queued_requests=100,
        chunked_prefill_size=64,
        eos_token_ids=(2,),
        runs_ahead=runs_ahead,
        debug_checks=True,
    )
    core = EngineCore(settings, runner, PrefixCache(FEW_BLOCKS, 16))
    for ask in mix:
        params = msgspec.structs.replace(ask.params, seed=ask.seed)
        core.handle(GenerateRequest(ask.name, ask.prompt.astype("<i4").tobytes(), params, ask.n))
    answers: dict = {}
    while core.has_work:
        for chunk in core.step():
            if isinstance(chunk, TokenChunk):
                entries = answers.setdefault((chunk.request_id, chunk.choice), [])
                entries.append((chunk.token_ids, chunk.finish_reason))
    assert core.stats().num_preemptions > 0 and core.stats().num_blocks_in_use == 0
    return answers


def tokens_of(answers: Answers) -> dict:
    return {key: [entry[:2] for entry in entries] for key, entries in answers.tokens.items()}
