"""Sampling parameters of one step as arrays, one entry a drawn token."""

from __future__ import annotations

import dataclasses
import functools
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
_NUM_FLOATS = 6
EXCLUDED = -1e30
"""Bias that rules a token out, yet leaves a token to draw if a request excludes all of them."""
MOST_ROOMS = 64
"""Numbers of rows whose arrays are kept; the one that was made first goes when there is one more."""


class SamplingTable:
    """What of requests stays the same from step to step, worked out once for those that come again.

    Which of them are drawn for may change with every step: no token is drawn where a constraint forces one.
    `workspace` and `seen` are scratch of `ops.sample` for the largest step, on the CPU if `is_host`.
    """

    def __init__(
        self, max_requests: int, workspace: torch.Tensor, seen: torch.Tensor, *, is_host: bool = True
    ) -> None:
        self._vocab_size = workspace.shape[1]
        self._scratch = workspace, seen
        on_device = functools.partial(torch.empty, dtype=torch.int32)
        self._new_ids = functools.partial(np.empty, dtype=np.int32) if is_host else on_device
        self._places: dict[Request, int] = {}
        self._numbers, self._seeds = _numbers(max_requests), np.zeros(max_requests, np.int64)
        self._has_penalty = [False] * max_requests
        self._may_have_bias = [False] * max_requests
        self._num_top = [-1] * max_requests
        self._is_plain = [True] * max_requests
        """Whether nothing but positions and masks changes from step to step."""
        self._rooms: dict[int, _Room] = {}
        self._room: _Room | None = None
        """That of the last step, for requests that are `_chosen`, at `_chosen_places`."""
        self._chosen: list[Request] = []
        self._chosen_places: list[int] = []

    def tensors(
        self, draws: Sequence[Draw], logits: torch.Tensor, bitmask: np.ndarray | None = None
    ) -> SamplingTensors:
        """Arguments of `ops.sample` for draws, of which a request may have several. `bitmask` is that of
        the step plan. But for `out_ids` and log-probabilities they are overwritten by the next call.

        Cost: 10 us, and 8 us more where the requests are not those of the last step. To make all arrays anew
        would take some 100 us of a step that has driven all of this out of the caches.
        """
        room = self._choose([draw.request for draw in draws])
        room.positions[:] = [num_known - request.prompt_len for request, num_known in draws]
        tensors = room.tensors
        tensors.logits = logits
        tensors.bitmask = None if bitmask is None else torch.from_numpy(bitmask)
        # New ones: the last may not have been read. No tensor on the host: torch takes ten times as long.
        tensors.out_ids = self._new_ids(len(draws))
        if all([self._is_plain[place] for place in self._chosen_places]):
            return tensors
        return dataclasses.replace(tensors, **self._special(draws))

    def looks_back(self) -> list[bool]:
        """Of each draw of the last step, whether a penalty looks at the tokens before it."""
        return [self._has_penalty[place] for place in self._chosen_places]

    def _choose(self, requests: list[Request]) -> _Room:
        """The arrays of a step with a row for each of these requests."""
        if self._room is not None and requests == self._chosen:
            return self._room
        if not all(request in self._places for request in requests):
            self._learn(dict.fromkeys(requests))
        if self._room is not None:
            self._room.tensors.logits = None  # which may be large
        self._chosen, places = requests, [self._places[request] for request in requests]
        self._chosen_places = places
        room = self._rooms.get(len(places))
        if room is None:
            if len(self._rooms) == MOST_ROOMS:
                del self._rooms[next(iter(self._rooms))]
            room = self._rooms[len(places)] = _Room(len(places), *self._scratch)
        np.take(self._numbers, places, axis=1, out=room.numbers, mode="clip")
        np.take(self._seeds, places, out=room.seeds, mode="clip")
        self._room = room
        return room

    def _special(self, draws: Sequence[Draw]) -> dict[str, torch.Tensor]:
        """What has to be made anew where requests have penalties, biases or log-probabilities."""
        places, num_rows = self._chosen_places, len(draws)
        most_top = max(0, *[self._num_top[place] for place in places])
        special = {
            "out_logprobs": torch.zeros(num_rows),
            "top_ids": torch.zeros(num_rows, most_top, dtype=torch.int32),
            "top_logprobs": torch.zeros(num_rows, most_top),
        }
        looks_back = self.looks_back()
        if any(looks_back):
            rows = zip(draws, looks_back, strict=True)
            known = [request.token_ids[:end] if looks else () for (request, end), looks in rows]
            special["token_ids"], special["token_indptr"] = _ragged_tokens(known)
        if any([self._may_have_bias[place] for place in places]):
            ragged = _ragged_biases([_bias(draw) for draw in draws])
            special["bias_ids"], special["bias_values"], special["bias_indptr"] = ragged
        return special

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
        self._numbers[:_NUM_FLOATS, place] = np.array(floats, np.float32).view(np.int32)
        self._numbers[_NUM_FLOATS:, place] = top_k, request.choice, request.prompt_len, num_top
        self._seeds[place] = request.seed
        has_penalty = floats[3:] != (1.0, 0.0, 0.0)
        may_have_bias = bool(params.logit_bias or params.min_tokens)
        self._has_penalty[place], self._may_have_bias[place] = has_penalty, may_have_bias
        self._num_top[place] = num_top
        self._is_plain[place] = not has_penalty and not may_have_bias and num_top < 0


class _Room:
    """The arrays of a step with so many rows; the next one with as many writes over them."""

    def __init__(self, num_rows: int, workspace: torch.Tensor, seen: torch.Tensor) -> None:
        self.numbers, self.seeds = _numbers(num_rows), np.empty(num_rows, np.int64)
        self.positions = np.empty(num_rows, np.int64)
        floats = _columns(self.numbers[:_NUM_FLOATS].view(np.float32))
        temperature, top_p, min_p, repetition, frequency, presence = floats
        top_k, choices, prompt_lens, num_top_logprobs = _columns(self.numbers[_NUM_FLOATS:])
        no_ids, indptr = torch.empty(0, dtype=torch.int32), torch.zeros(num_rows + 1, dtype=torch.int64)
        self.tensors = SamplingTensors(
            logits=None,
            workspace=workspace[:num_rows],
            seen=seen[:num_rows],
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition,
            frequency_penalty=frequency,
            presence_penalty=presence,
            seeds=torch.from_numpy(self.seeds),
            choices=choices,
            positions=torch.from_numpy(self.positions),
            token_ids=no_ids,
            token_indptr=indptr,
            prompt_lens=prompt_lens,
            bias_ids=no_ids,
            bias_values=torch.empty(0),
            bias_indptr=indptr,
            bitmask=None,
            num_top_logprobs=num_top_logprobs,
            out_ids=None,
            out_logprobs=torch.zeros(num_rows),
            top_ids=torch.zeros(num_rows, 0, dtype=torch.int32),
            top_logprobs=torch.zeros(num_rows, 0),
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


def _numbers(num_places: int) -> np.ndarray:
    """The 32 bits of each parameter but the seed, int32 [10, P]: those of `_FLOATS` first. One array, so that
    one call picks what a step needs."""
    return np.zeros((_NUM_FLOATS + 4, num_places), np.int32)


def _columns(array: np.ndarray) -> tuple[torch.Tensor, ...]:
    """One contiguous tensor [R] for each row of an array [C, R]."""
    return tuple(map(torch.from_numpy, array))


def _indptr(ragged: Sequence) -> torch.Tensor:
    return torch.from_numpy(np.cumsum([0, *map(len, ragged)], dtype=np.int64))
