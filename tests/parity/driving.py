"""Drive a `ModelRunner` by hand, one request at a time, without a scheduler."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from engine.models.any_model import read_any_spec
from engine.runner.model_runner import ModelRunner
from engine.sampling.params import SamplingParams
from engine.scheduling.request import Request
from engine.scheduling.step_plan import StepPlan, StepRow

BLOCK_SIZE = 16
CONTEXT_LENGTH = 800
NUM_BLOCKS = 64


def make_runner(directory: Path, *, dtype: str = "float32", **options) -> ModelRunner:
    """A small runner for a saved model."""
    return ModelRunner(
        read_any_spec(directory),
        directory,
        dtype=dtype,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        context_length=CONTEXT_LENGTH,
        max_tokens=CONTEXT_LENGTH,
        max_rows=4,
        num_threads=2,
        **options,
    )


def make_request(prompt: list[int], *, num_blocks: int = NUM_BLOCKS) -> Request:
    """A greedy request on blocks in a scrambled order, so that a wrong block table shows."""
    token_ids = np.zeros(CONTEXT_LENGTH, np.int32)
    token_ids[: len(prompt)] = prompt
    return Request(
        request_id="r",
        choice=0,
        params=SamplingParams(temperature=0.0),
        seed=0,
        namespace="",
        token_ids=token_ids,
        block_table=np.random.default_rng(0).permutation(num_blocks).astype(np.int32),
        prompt_len=len(prompt),
        num_known=len(prompt),
        max_known=CONTEXT_LENGTH,
        arrival=0,
        num_blocks=-(-CONTEXT_LENGTH // BLOCK_SIZE),
    )


def step_logits(runner: ModelRunner, request: Request, num_tokens: int) -> torch.Tensor:
    """Compute the next `num_tokens` known tokens; logits [V] after the last of them."""
    logits = runner.compute_logits(StepPlan([StepRow(request, request.num_computed, num_tokens, True)]))[0]
    request.num_computed += num_tokens
    return logits.clone()


def generate(runner: ModelRunner, prompt: list[int], num_tokens: int, chunk: int = CONTEXT_LENGTH):
    """Greedy continuation: (token ids, logits [num_tokens, V])."""
    request = make_request(prompt)
    rows = []
    while len(rows) < num_tokens:
        pending = request.num_known - request.num_computed
        logits = step_logits(runner, request, min(chunk, pending))
        if request.num_computed < request.num_known:
            continue
        rows.append(logits)
        request.token_ids[request.num_known] = int(logits.argmax())
        request.num_known += 1
    return request.token_ids[len(prompt) : request.num_known].tolist(), torch.stack(rows)
