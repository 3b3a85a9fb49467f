"""Sampling parameters of one step as arrays, one entry a sampled row."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from engine.sampling.params import SamplingParams
from engine.scheduling.request import Request
from engine.scheduling.step_plan import StepRow


@dataclasses.dataclass(slots=True)
class SamplingBatch:
    """What the sampling kernel reads besides the logits, for R rows.

    Shapes: float32 [R]: `temperature` (0 is greedy), `top_p`, `min_p`, the penalties; int32 [R]:
    `top_k` (0 is off), `choice`, `position` (of the drawn token among the outputs),
    `prompt_len`; int64 [R]: `seed`. Ragged by row: row r owns [offsets[r], offsets[r + 1]) of
    `bias_ids`, `bias_values` (added to the logits) and of `known_ids` (prompt, then output; empty
    where no penalty looks at them). `num_top` is the most alternatives that a row wants reported,
    None when no row wants log-probabilities.
    """

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    repetition_penalty: np.ndarray
    frequency_penalty: np.ndarray
    presence_penalty: np.ndarray
    seed: np.ndarray
    choice: np.ndarray
    position: np.ndarray
    prompt_len: np.ndarray
    bias_offsets: np.ndarray
    bias_ids: np.ndarray
    bias_values: np.ndarray
    known_offsets: np.ndarray
    known_ids: np.ndarray
    num_top: int | None


def build_batch(rows: Sequence[StepRow], eos_token_ids: tuple[int, ...]) -> SamplingBatch:
    """Arrays for the sampled rows of a step.

    Effects: none. A row below its `min_tokens` gets a bias of minus infinity on every token that
    would end it.
    """
    requests = [row.request for row in rows]
    params = [request.params for request in requests]
    bias_offsets, bias_ids, bias_values = _biases(requests, eos_token_ids)
    known = [_penalised_ids(request) for request in requests]
    wanted = [p.logprobs for p in params if p.logprobs is not None]
    return SamplingBatch(
        temperature=_floats(0.0 if p.is_greedy else p.temperature for p in params),
        top_k=_ints(max(p.top_k, 0) for p in params),
        top_p=_floats(p.top_p for p in params),
        min_p=_floats(p.min_p for p in params),
        repetition_penalty=_floats(p.repetition_penalty for p in params),
        frequency_penalty=_floats(p.frequency_penalty for p in params),
        presence_penalty=_floats(p.presence_penalty for p in params),
        seed=np.array([request.seed for request in requests], np.int64),
        choice=_ints(request.choice for request in requests),
        position=_ints(request.num_output for request in requests),
        prompt_len=_ints(request.prompt_len for request in requests),
        bias_offsets=bias_offsets,
        bias_ids=bias_ids,
        bias_values=bias_values,
        known_offsets=_offsets([len(ids) for ids in known]),
        known_ids=np.concatenate(known) if known else np.empty(0, np.int32),
        num_top=max(wanted) if wanted else None,
    )


def _biases(
    requests: Sequence[Request], eos_token_ids: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    biases = [_bias(request, eos_token_ids) for request in requests]
    offsets = _offsets([len(bias) for bias in biases])
    ids = np.array([token_id for bias in biases for token_id in bias], np.int32)
    values = np.array([value for bias in biases for value in bias.values()], np.float32)
    return offsets, ids, values


def _bias(request: Request, eos_token_ids: tuple[int, ...]) -> dict[int, float]:
    params = request.params
    if request.num_output >= params.min_tokens:
        return params.logit_bias
    ends = params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, *eos_token_ids)
    return {**params.logit_bias, **dict.fromkeys(ends, float("-inf"))}


def _penalised_ids(request: Request) -> np.ndarray:
    return request.token_ids[: request.num_known if _has_penalty(request.params) else 0]


def _has_penalty(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0
    )


def _floats(values) -> np.ndarray:
    return np.fromiter(values, np.float32)


def _ints(values) -> np.ndarray:
    return np.fromiter(values, np.int32)


def _offsets(counts: list[int]) -> np.ndarray:
    return np.cumsum([0, *counts], dtype=np.int32)
