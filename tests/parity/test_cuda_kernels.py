"""A whole model on the CUDA backend's own ops: kernels run on the CPU thread by thread, or interpreted."""

from __future__ import annotations

import pytest
import torch

from engine.ops import cuda
from engine.ops.placement import on_gpu
from helpers import triton_kernels  # before the backend's kernels, which are then interpreted
from helpers.cuda_host import HostContext, emulated_ops
from helpers.tiny_models import load_model, make_model, save_model
from parity.driving import generate, make_runner
from parity.test_device_path import FakeGraphs
from parity.test_transformers import TOLERANCE, make_prompt, their_logits, worst_error


@pytest.mark.skipif(triton_kernels.DEVICE != "cpu", reason="there is a GPU: see tests/gpu")
@pytest.mark.parametrize(
    ("kind", "dtype", "options"),
    [
        ("llama", "float32", {}),
        ("gemma3", "bfloat16", {}),
        ("gpt_oss", "bfloat16", {}),
        ("llama", "bfloat16", {"kv_cache_dtype": "fp8"}),
    ],
)
def test_a_model_answers(kind, dtype, options, tmp_path):
    """A prompt in two chunks, then decoding, replayed from its second step on; greedy draws by `generate`.

    float32 agrees to rounding. Rows in bfloat16 err as those of transformers do, which keeps them and
    attention's weights so, too: the median row. A cache of fp8 has 16 times the error of one of bfloat16.
    """
    save_model(make_model(kind).to(getattr(torch, dtype)), tmp_path)
    prompt, graphs = make_prompt(70), FakeGraphs()
    placed = {"ops": cuda, "placement": on_gpu(dtype, "cpu"), "context": HostContext(), "capture": graphs}
    with emulated_ops():
        tokens, ours = generate(make_runner(tmp_path, dtype=dtype, **placed, **options), prompt, 5, chunk=48)
    assert graphs.num_captured == 1 and graphs.num_replayed > 0
    theirs, exact = (
        their_logits(load_model(tmp_path, kind), prompt, tokens)
        for kind in (getattr(torch, dtype), torch.float32)
    )
    if dtype == "float32":
        assert worst_error(ours, exact) <= TOLERANCE
        return
    our_error, their_error = ((x - exact).norm(dim=-1).median() for x in (ours, theirs))
    assert 0 < our_error <= (16 if options else 2) * their_error
