"""Drawing one token a row on a GPU. Nothing here waits for the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from engine import _native

if TYPE_CHECKING:
    from engine.ops.cuda.context import ExecutionContext
    from engine.ops.sampling import SamplingTensors

Tensor = Any


def sample(ctx: ExecutionContext, tensors: SamplingTensors) -> None:
    """Draw one token for each row: `engine.ops.sampling.sample`, all of whose tensors are on the device.

    The token is the CPU's, unless u * total falls within 1e-5 of the total of the edge between two tokens,
    or a filter's limit within as much of the next token: weights are integers here, the likeliest token's
    being 2^40, so that sums are exact and the same in whichever order they are taken. A row's results depend
    on nothing but the row. What tensors hold is not checked, which would mean to wait: ids outside the
    vocabulary are passed over, and bounds outside a list count as its ends.

    Effects: `workspace` is overwritten for rows with penalties, biases or a mask; `logits` never.
    Cost: four passes over rows with top-p, one more for top-k, some more for log-probabilities, and a copy
    into `workspace` where something changes logits. Logits that are nearly all alike cannot be told apart in
    few passes: a filter reads those several times, one block a row. Scratch memory, 45 KiB a row and more
    for many reported tokens, comes from torch.
    """
    scratch = _scratch(tensors.logits, tensors.top_ids)
    arguments = {name: getattr(tensors, name) for name in tensors.__slots__}
    _native.cuda.sample(scratch, **arguments)


def score_tokens(
    ctx: ExecutionContext,
    logits: Tensor,
    token_ids: Tensor,
    num_top_logprobs: Tensor,
    out_logprobs: Tensor,
    top_ids: Tensor,
    top_logprobs: Tensor,
    reports_logits: bool = False,
) -> None:
    """Log-probabilities of tokens that are known already: `engine.ops.sampling.score_tokens` on the device.

    A row whose token lies outside the vocabulary is left as it is.
    """
    _native.cuda.score_tokens(
        _scratch(logits, top_ids),
        logits,
        token_ids,
        num_top_logprobs,
        out_logprobs,
        top_ids,
        top_logprobs,
        reports_logits,
    )


def _scratch(logits: Tensor, top_ids: Tensor) -> torch.Tensor:
    """Memory of torch's, which gives it to another only behind what is launched on this stream now."""
    num_bytes = _native.cuda.sampling_scratch_bytes(*logits.shape, top_ids.shape[1])
    return torch.empty(num_bytes, dtype=torch.uint8, device=logits.device)
