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


class SamplingTable:
    """What of requests stays the same from step to step, worked out once for those that come again.

    Which of them are drawn for may change with every step: no token is drawn where a constraint forces one.
    """

    def __init__(self, vocab_size: int, max_requests: int) -> None:
        self._vocab_size, self._max_requests = vocab_size, max_requests
        self._learn([])

    def batch(self, requests: Sequence[Request]) -> SamplingBatch:
        """The rows of one step; a request may come more than once.

        Cost: 10 us for requests that have come before, or 30 us and 5 us for each.
        """
        if not all(request in self._places for request in requests):
            known = dict.fromkeys([*requests, *self._places])
            self._learn(list(known)[: max(self._max_requests, len(requests))])
        places = [self._places[request] for request in requests]
        return SamplingBatch(
            requests,
            np.take(self._floats, places, axis=1),
            np.take(self._integers, places, axis=1),
            np.take(self._long_integers, places, axis=1),
            [self._has_penalty[place] for place in places] if self._any_penalty else (),
            max(0, *[self._num_top[place] for place in places]) if self._any_top else 0,
            self._may_have_bias,
        )

    def _learn(self, requests: list[Request]) -> None:
        self._places = {request: place for place, request in enumerate(requests)}
        params = [request.params for request in requests]
        floats = [_FLOATS(p) for p in params]
        self._num_top = [-1 if p.logprobs is None else min(p.logprobs, self._vocab_size) for p in params]
        small = [
            (min(r.params.top_k, self._vocab_size), r.choice, r.prompt_len, num_top)
            for r, num_top in zip(requests, self._num_top, strict=True)
        ]
        long = [(request.prompt_len, request.seed) for request in requests]
        self._floats = np.array(floats, np.float32).reshape(-1, 6).T
        self._integers = np.array(small, np.int32).reshape(-1, 4).T
        self._long_integers = np.array(long, np.int64).reshape(-1, 2).T
        self._has_penalty = [row[3:] != (1.0, 0.0, 0.0) for row in floats]
        self._any_penalty, self._any_top = any(self._has_penalty), max([0, *self._num_top]) > 0
        self._may_have_bias = any(p.logit_bias or p.min_tokens for p in params)


class SamplingBatch:
    """The requests of a step, one entry for each row of logits, and their rows of a `SamplingTable`."""

    def __init__(
        self,
        requests: Sequence[Request],
        floats: np.ndarray,
        integers: np.ndarray,
        long_integers: np.ndarray,
        has_penalty: Sequence[bool],
        most_top: int,
        may_have_bias: bool,
    ) -> None:
        self.requests = requests
        self._floats = _columns(floats)
        self._integers = _columns(integers)
        self._prompt_lens, self._seeds = long_integers[0], torch.from_numpy(long_integers[1])
        self._has_penalty, self._most_top, self._may_have_bias = has_penalty, most_top, may_have_bias
        nothing = torch.zeros(len(requests) + 1, dtype=torch.int64)
        self._no_tokens = torch.empty(0, dtype=torch.int32), nothing
        self._no_biases = torch.empty(0, dtype=torch.int32), torch.empty(0), nothing

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


def _columns(array: np.ndarray) -> tuple[torch.Tensor, ...]:
    """One contiguous tensor [R] for each row of an array [C, R]."""
    return torch.from_numpy(array).unbind()


def _indptr(ragged: Sequence) -> torch.Tensor:
    return torch.from_numpy(np.cumsum([0, *map(len, ragged)], dtype=np.int64))
