"""Sampling parameters of one step as arrays, one entry a sampled row."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from engine.ops.sampling import SamplingTensors
from engine.scheduling.request import Request
from engine.scheduling.step_plan import Draw

_FLOATS = operator.attrgetter(
    "temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"
)
EXCLUDED = -1e30
"""Bias that rules a token out, yet leaves a token to draw if a request excludes all of them."""


class SamplingBatch:
    """The requests of a step, one entry for each row of logits, and what of their arrays stays from step to
    step as long as they are the same ones.
    """

    def __init__(self, requests: Sequence[Request], vocab_size: int) -> None:
        self.requests = requests
        params = [request.params for request in requests]
        floats = [_FLOATS(p) for p in params]
        self._floats = _columns(np.array(floats, np.float32))
        num_top = [-1 if p.logprobs is None else min(p.logprobs, vocab_size) for p in params]
        self._most_top = max(0, *num_top)
        small = [
            (min(r.params.top_k, vocab_size), r.choice, r.prompt_len, k)
            for r, k in zip(requests, num_top, strict=True)
        ]
        self._integers = _columns(np.array(small, np.int32))
        self._prompt_lens = np.array([request.prompt_len for request in requests], np.int64)
        self._seeds = torch.from_numpy(np.array([request.seed for request in requests], np.int64))
        self._has_penalty = [row[3:] != (1.0, 0.0, 0.0) for row in floats]
        self._may_have_bias = any(p.logit_bias or p.min_tokens for p in params)
        self._no_tokens = _ragged_tokens([()] * len(requests))
        self._no_biases = _ragged_biases([{}] * len(requests))

    def tensors(
        self,
        draws: Sequence[Draw],
        logits: torch.Tensor,
        workspace: torch.Tensor,
        seen: torch.Tensor,
        bitmask: np.ndarray | None = None,
    ) -> SamplingTensors:
        """Arguments of `ops.sample` for draws of these requests. `bitmask` is that of the step plan."""
        num_rows = len(draws)
        temperature, top_p, min_p, repetition, frequency, presence = self._floats
        top_k, choices, prompt_lens, num_top_logprobs = self._integers
        positions = np.array([num_known for _, num_known in draws], np.int64) - self._prompt_lens
        (token_ids, token_indptr), bias = self._no_tokens, self._no_biases
        if any(self._has_penalty):
            rows = zip(draws, self._has_penalty, strict=True)
            known = [request.token_ids[:end] if looks else () for (request, end), looks in rows]
            token_ids, token_indptr = _ragged_tokens(known)
        if self._may_have_bias:
            bias = _ragged_biases([_bias(draw) for draw in draws])
        bias_ids, bias_values, bias_indptr = bias
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
            seeds=self._seeds,
            choices=choices,
            positions=torch.from_numpy(positions),
            token_ids=token_ids,
            token_indptr=token_indptr,
            prompt_lens=prompt_lens,
            bias_ids=bias_ids,
            bias_values=bias_values,
            bias_indptr=bias_indptr,
            bitmask=None if bitmask is None else torch.from_numpy(bitmask),
            num_top_logprobs=num_top_logprobs,
            out_ids=torch.empty(num_rows, dtype=torch.int32),
            out_logprobs=torch.zeros(num_rows),
            top_ids=torch.zeros(num_rows, self._most_top, dtype=torch.int32),
            top_logprobs=torch.zeros(num_rows, self._most_top),
        )


def _bias(draw: Draw) -> dict[int, float]:
    """Logit bias of one row; below `min_tokens` nothing that would end the output may be drawn."""
    banned, bias = draw.request.banned_behind(draw.num_known), draw.request.params.logit_bias
    return bias if banned is None else {**bias, **dict.fromkeys(banned, EXCLUDED)}


def _ragged_tokens(known: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(np.concatenate(known, dtype=np.int32, casting="unsafe")), _indptr(known)


def _ragged_biases(biases: Sequence[dict[int, float]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = [token_id for bias in biases for token_id in bias]
    values = [value for bias in biases for value in bias.values()]
    return (
        torch.tensor(ids, dtype=torch.int32),
        torch.tensor(values, dtype=torch.float32),
        _indptr(biases),
    )


def _columns(rows: np.ndarray) -> tuple[torch.Tensor, ...]:
    """One contiguous tensor [R] for each column of an array [R, C]."""
    return torch.from_numpy(np.ascontiguousarray(rows.T)).unbind()


def _indptr(ragged: Sequence) -> torch.Tensor:
    return torch.from_numpy(np.cumsum([0, *map(len, ragged)], dtype=np.int64))
