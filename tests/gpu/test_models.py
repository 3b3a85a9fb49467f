"""Whole models on a GPU: against transformers on the same GPU, and against themselves."""

from __future__ import annotations

import pytest
import torch

from engine.ops import cuda
from engine.ops.placement import on_gpu
from engine.runner.decode_graphs import cuda_capture
from helpers.tiny_models import KINDS, load_model, make_model, save_model
from parity.driving import generate, make_request, make_runner, step_logits
from parity.test_p1 import Machine, assert_same, make_mix
from parity.test_transformers import make_prompt, their_logits

pytestmark = pytest.mark.gpu

DTYPES = ["bfloat16", "float16"]
NUM_TOKENS = 32


def gpu_options(dtype: str, *, graphs: bool = True, deterministic: bool = False) -> dict:
    return {
        "dtype": dtype,
        "ops": cuda,
        "placement": on_gpu(dtype),
        "context": cuda.ExecutionContext(is_deterministic=deterministic),
        "capture": cuda_capture() if graphs else None,
    }


def logits_along(runner, text: list[int], prompt_len: int, chunk: int) -> torch.Tensor:
    """Logits [N, V] behind a prompt and behind each token that follows it, one step a token."""
    request, rows = make_request(text), []
    while request.num_computed < len(text):
        pending = prompt_len - request.num_computed
        logits = step_logits(runner, request, max(1, min(chunk, pending)))
        if request.num_computed >= prompt_len:
            rows.append(logits)
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_of_the_size_of_those_of_transformers(kind, dtype, tmp_path):
    """The median row, for a rounding sends some to other experts. Both round rows and add in float32, in
    orders of their own."""
    save_model(make_model(kind).to(getattr(torch, dtype)), tmp_path)
    prompt = make_prompt(200)
    tokens, ours = generate(make_runner(tmp_path, **gpu_options(dtype)), prompt, NUM_TOKENS)
    theirs = their_logits(load_model(tmp_path, getattr(torch, dtype)).cuda(), prompt, tokens)
    exact = their_logits(load_model(tmp_path, torch.float32), prompt, tokens)
    our_error, their_error = ((x.cpu() - exact).square().mean(-1).median() for x in (ours, theirs))
    assert 0 < our_error <= 2 * their_error


def test_chunks_and_graphs_change_logits_by_roundings_only(tmp_path):
    """Behind each token of a text that is given, of which the last ones are decoded."""
    save_model(make_model("llama").bfloat16(), tmp_path)
    text = make_prompt(300 + NUM_TOKENS)
    expected, *others = (
        logits_along(make_runner(tmp_path, **gpu_options("bfloat16", graphs=graphs)), text, 300, chunk)
        for graphs in (True, False)
        for chunk in (37, 800)
    )
    for logits in others:
        assert (logits - expected).abs().max() <= 0.1 * expected.std()


@pytest.mark.parametrize("options", [{}, {"kv_cache_dtype": "fp8"}, {"quantization": "int8"}])
def test_deterministic_answers_do_not_depend_on_their_batch(options, tmp_path):
    """P1 with all its mixes: alone and together, in chunks, from the cache, and after preemption."""
    save_model(make_model("mistral").bfloat16(), tmp_path)
    machine = Machine(tmp_path, **gpu_options("bfloat16", deterministic=True), **options)
    mix = make_mix()
    alone = machine.answer([[ask] for ask in mix], cached=False)
    for circumstances in ({"chunk": 16}, {"chunk": 512}, {"chunk": 16, "num_blocks": 22}):
        assert_same(machine.answer([mix], **circumstances), alone)


def test_a_kernel_that_faults_loses_the_gpu_and_the_context_knows(tmp_path):
    """In a process of its own, which can do nothing more on the GPU afterwards."""
    import subprocess
    import sys

    code = """
import torch
from engine.ops import cuda
ctx = cuda.ExecutionContext()
assert not ctx.is_lost
torch.zeros(4, device="cuda")[torch.tensor([1 << 40], device="cuda")]
print("lost" if ctx.is_lost else "fine", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "lost", done.stderr
