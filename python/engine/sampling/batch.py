"""Sampling parameters of one step as arrays, one entry a sampled row."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
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
        self._vocab_size = vocab_size
        self._places: dict[Request, int] = {}
        self._floats = np.zeros((6, max_requests), np.float32)
        self._integers = np.zeros((4, max_requests), np.int32)
        self._long_integers = np.zeros((2, max_requests), np.int64)
        self._has_penalty = [False] * max_requests
        self._may_have_bias = [False] * max_requests
        self._num_top = [-1] * max_requests

    def batch(self, requests: Sequence[Request]) -> SamplingBatch:
        """The rows of one step; a request may come more than once.

        Cost: 10 us for requests that have come before, and 5 us for each that has not.
        """
        if not all(request in self._places for request in requests):
            self._learn(dict.fromkeys(requests))
        places = [self._places[request] for request in requests]
        return SamplingBatch(
            requests,
            np.take(self._floats, places, axis=1),
            np.take(self._integers, places, axis=1),
            np.take(self._long_integers, places, axis=1),
            [self._has_penalty[place] for place in places],
            max(0, *[self._num_top[place] for place in places]),
            any([self._may_have_bias[place] for place in places]),
        )

    def _learn(self, requests: Collection[Request]) -> None:
        """Give each its place. Of the others those lose theirs that have come to their end, for a long
        prompt is a lot to hold, and all of them if there is no place left."""
        new = [request for request in requests if request not in self._places]
        self._places = {r: place for r, place in self._places.items() if r.num_blocks or r in requests}
        if len(self._places) + len(new) > len(self._num_top):
            self._places = {r: place for r, place in self._places.items() if r in requests}
        taken = set(self._places.values())
        free = [place for place in range(len(self._num_top)) if place not in taken]
        for request, place in zip(new, free, strict=False):
            self._places[request] = place
            self._write(place, request)

    def _write(self, place: int, request: Request) -> None:
        params = request.params
        num_top = -1 if params.logprobs is None else min(params.logprobs, self._vocab_size)
        floats, top_k = _FLOATS(params), min(params.top_k, self._vocab_size)
        self._floats[:, place] = floats
        self._integers[:, place] = top_k, request.choice, request.prompt_len, num_top
        self._long_integers[:, place] = request.prompt_len, request.seed
        self._has_penalty[place] = floats[3:] != (1.0, 0.0, 0.0)
        self._may_have_bias[place] = bool(params.logit_bias or params.min_tokens)
        self._num_top[place] = num_top


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
        self.has_penalty, self._most_top, self._may_have_bias = has_penalty, most_top, may_have_bias
        nothing = torch.zeros(len(requests) + 1, dtype=torch.int64)
        self._no_tokens = torch.empty(0, dtype=torch.int32), nothing
        self._no_biases = torch.empty(0, dtype=torch.int32), torch.empty(0), nothing
        self._is_plain = not any(has_penalty) and not may_have_bias and bool((integers[3] < 0).all())
        """Whether nothing but positions and masks changes from step to step."""
        self._kept: SamplingTensors | None = None

    def tensors(
        self,
        draws: Sequence[Draw],
        logits: torch.Tensor,
        workspace: torch.Tensor,
        seen: torch.Tensor,
        bitmask: np.ndarray | None = None,
    ) -> SamplingTensors:
        """Arguments of `ops.sample` for draws of these requests. `bitmask` is that of the step plan;
        `workspace` and `seen` may have more rows.

        Those of the last step are used again where they can be: to make them costs some 100 us of a step
        that has driven all of this out of the caches.
        """
        num_rows = len(draws)
        positions = np.array([num_known for _, num_known in draws], np.int64) - self._prompt_lens
        mask = None if bitmask is None else torch.from_numpy(bitmask)
        kept = self._kept
        if kept is not None and kept.logits.data_ptr() == logits.data_ptr():
            kept.positions, kept.bitmask = torch.from_numpy(positions), mask
            kept.out_ids = torch.empty(num_rows, dtype=torch.int32)  # the last ones may not have been read
            return kept
        temperature, top_p, min_p, repetition, frequency, presence = self._floats
        top_k, choices, prompt_lens, num_top_logprobs = self._integers
        (token_ids, token_indptr), bias = self._no_tokens, self._no_biases
        if any(self.has_penalty):
            rows = zip(draws, self.has_penalty, strict=True)
            known = [request.token_ids[:end] if looks else () for (request, end), looks in rows]
            token_ids, token_indptr = _ragged_tokens(known)
        if self._may_have_bias:
            bias = _ragged_biases([_bias(draw) for draw in draws])
        bias_ids, bias_values, bias_indptr = bias
        tensors = SamplingTensors(
            logits=logits,
            workspace=workspace[:num_rows],
            seen=seen[:num_rows],
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
            bitmask=mask,
            num_top_logprobs=num_top_logprobs,
            out_ids=torch.empty(num_rows, dtype=torch.int32),
            out_logprobs=torch.zeros(num_rows),
            top_ids=torch.zeros(num_rows, self._most_top, dtype=torch.int32),
            top_logprobs=torch.zeros(num_rows, self._most_top),
        )
        if self._is_plain:
            self._kept = tensors
        return tensors


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
    return tuple(map(torch.from_numpy, array))


def _indptr(ragged: Sequence) -> torch.Tensor:
    return torch.from_numpy(np.cumsum([0, *map(len, ragged)], dtype=np.int64))
