"""Sampling parameters of one step as arrays, one entry a sampled row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.ops.sampling import SamplingTensors
from engine.sampling.params import SamplingParams
from engine.scheduling.step_plan import Draw

EXCLUDED = -1e30
"""Bias that rules a token out, yet leaves a token to draw if a request excludes all of them."""


def build_tensors(
    draws: Sequence[Draw],
    logits: torch.Tensor,
    workspace: torch.Tensor,
    seen: torch.Tensor,
    bitmask: np.ndarray | None = None,
) -> SamplingTensors:
    """Arguments of `ops.sample` for the draws of a step, one row of logits each.

    `bitmask` is that of the step plan.
    """
    num_rows, vocab_size = logits.shape
    requests = [draw.request for draw in draws]
    params = [request.params for request in requests]
    floats = np.array([_float_params(p) for p in params], np.float32)
    temperature, top_p, min_p, repetition, frequency, presence = _columns(floats)
    num_top = [-1 if p.logprobs is None else min(p.logprobs, vocab_size) for p in params]
    small = [
        (min(r.params.top_k, vocab_size), r.choice, r.prompt_len, k)
        for r, k in zip(requests, num_top, strict=True)
    ]
    top_k, choices, prompt_lens, num_top_logprobs = _columns(np.array(small, np.int32))
    seeds, positions = _columns(np.array([(r.seed, end - r.prompt_len) for r, end in draws], np.int64))
    known = [r.token_ids[:end] if _has_penalty(r.params) else [] for r, end in draws]
    biases = [_bias(draw) for draw in draws]
    most_top = max(0, *num_top)
    return SamplingTensors(
        logits=logits,
        workspace=workspace,
        seen=seen,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        presence_penalty=presence,
        seeds=seeds,
        choices=choices,
        positions=positions,
        token_ids=torch.from_numpy(np.concatenate(known, dtype=np.int32, casting="unsafe")),
        token_indptr=_indptr(known),
        prompt_lens=prompt_lens,
        bias_ids=torch.tensor([token_id for bias in biases for token_id in bias], dtype=torch.int32),
        bias_values=torch.tensor([value for bias in biases for value in bias.values()], dtype=torch.float32),
        bias_indptr=_indptr(biases),
        bitmask=None if bitmask is None else torch.from_numpy(bitmask),
        num_top_logprobs=num_top_logprobs,
        out_ids=torch.empty(num_rows, dtype=torch.int32),
        out_logprobs=torch.zeros(num_rows),
        top_ids=torch.zeros(num_rows, most_top, dtype=torch.int32),
        top_logprobs=torch.zeros(num_rows, most_top),
    )


def _float_params(params: SamplingParams) -> tuple[float, ...]:
    return (
        params.temperature,
        params.top_p,
        params.min_p,
        params.repetition_penalty,
        params.frequency_penalty,
        params.presence_penalty,
    )


def _has_penalty(params: SamplingParams) -> bool:
    return _float_params(params)[3:] != (1.0, 0.0, 0.0)


def _bias(draw: Draw) -> dict[int, float]:
    """Logit bias of one row; below `min_tokens` nothing that would end the output may be drawn."""
    banned, bias = draw.request.banned_behind(draw.num_known), draw.request.params.logit_bias
    return bias if banned is None else {**bias, **dict.fromkeys(banned, EXCLUDED)}


def _columns(rows: np.ndarray) -> tuple[torch.Tensor, ...]:
    """One contiguous tensor [R] for each column of an array [R, C]."""
    return torch.from_numpy(np.ascontiguousarray(rows.T)).unbind()


def _indptr(ragged: Sequence) -> torch.Tensor:
    return torch.from_numpy(np.cumsum([0, *map(len, ragged)], dtype=np.int64))
