"""Requests turned into the arrays that the sampling kernel reads."""

from __future__ import annotations

import dataclasses
import random
import sys

import numpy as np
import pytest
import torch

from engine.sampling.batch import EXCLUDED, MOST_ROOMS, SamplingTable
from engine.sampling.params import SamplingParams
from engine.scheduling.request import Request
from engine.scheduling.step_plan import Draw

VOCAB = 50


def make_request(prompt=(1, 2, 3), output=(), *, seed=0, choice=0, stop_ids=(), **params) -> Request:
    known = [*prompt, *output]
    token_ids = np.full(20, -7, np.int32)
    token_ids[: len(known)] = known
    return Request(
        request_id="r",
        choice=choice,
        params=SamplingParams(**params),
        seed=seed,
        namespace="",
        token_ids=token_ids,
        block_table=np.empty(0, np.int32),
        prompt_len=len(prompt),
        num_known=len(known),
        max_known=20,
        arrival=0,
        stop_ids=frozenset(stop_ids),
    )


def make_table(max_requests: int, max_rows: int = 8) -> SamplingTable:
    return SamplingTable(
        max_requests, torch.zeros(max_rows, VOCAB), torch.zeros(max_rows, 2, dtype=torch.int32)
    )


def build(*requests: Request):
    return step(make_table(len(requests)), requests)


def step(table: SamplingTable, requests):
    draws = [Draw(request, request.num_known) for request in requests]
    return table.tensors(draws, torch.zeros(len(draws), VOCAB))


def ragged(values: torch.Tensor, indptr: torch.Tensor) -> list[list]:
    ends = indptr.tolist()
    assert ends[-1] == len(values)
    return [values[a:b].tolist() for a, b in zip(ends, ends[1:], strict=False)]


def test_each_value_reaches_its_row():
    tensors = build(
        make_request(
            temperature=0.5, top_p=0.75, min_p=0.25, top_k=7, seed=-5, choice=2, output=(9,), logprobs=4
        ),
        make_request(
            repetition_penalty=1.5, frequency_penalty=-0.5, presence_penalty=0.25, seed=2**62, prompt=(4,)
        ),
    )
    expected = {
        "temperature": [0.5, 1.0],
        "top_p": [0.75, 1.0],
        "min_p": [0.25, 0.0],
        "top_k": [7, -1],
        "repetition_penalty": [1.0, 1.5],
        "frequency_penalty": [0.0, -0.5],
        "presence_penalty": [0.0, 0.25],
        "seeds": [-5, 2**62],
        "choices": [2, 0],
        "positions": [1, 0],
        "prompt_lens": [3, 1],
        "num_top_logprobs": [4, -1],
    }
    for name, values in expected.items():
        tensor = getattr(tensors, name)
        assert tensor.tolist() == values, name
        assert tensor.is_contiguous(), name
    assert tensors.top_ids.shape == tensors.top_logprobs.shape == (2, 4)


@pytest.mark.parametrize("penalty", ["repetition_penalty", "frequency_penalty", "presence_penalty"])
def test_known_tokens_go_only_where_a_penalty_looks(penalty):
    tensors = build(make_request(), make_request(output=(8, 8), **{penalty: 1.25}), make_request())
    assert ragged(tensors.token_ids, tensors.token_indptr) == [[], [1, 2, 3, 8, 8], []]
    assert tensors.token_ids.dtype == torch.int32


def test_logit_bias_is_ragged():
    tensors = build(
        make_request(logit_bias={4: 1.5, 9: -100.0}), make_request(), make_request(logit_bias={0: 2.0})
    )
    assert ragged(tensors.bias_ids, tensors.bias_indptr) == [[4, 9], [], [0]]
    assert ragged(tensors.bias_values, tensors.bias_indptr) == [[1.5, -100.0], [], [2.0]]


def test_nothing_ends_before_min_tokens():
    early = make_request(output=(5,), min_tokens=2, stop_ids=(2, 30), logit_bias={2: 50.0, 3: 1.0})
    due = make_request(output=(5, 5), min_tokens=2, stop_ids=(2, 30), logit_bias={2: 50.0, 3: 1.0})
    tensors = build(early, due)
    ids = ragged(tensors.bias_ids, tensors.bias_indptr)
    values = ragged(tensors.bias_values, tensors.bias_indptr)
    assert dict(zip(ids[0], values[0], strict=True)) == {
        2: np.float32(EXCLUDED), 3: 1.0, 30: np.float32(EXCLUDED),
    }  # fmt: skip
    assert dict(zip(ids[1], values[1], strict=True)) == {2: 50.0, 3: 1.0}


def test_without_anything_ragged():
    tensors = build(make_request())
    assert tensors.token_ids.shape == tensors.bias_ids.shape == (0,)
    assert tensors.top_ids.shape == (1, 0)


def test_a_huge_top_k_is_all_of_the_vocabulary():
    """It must not fail the step, which other requests share."""
    assert build(make_request(top_k=2**62), make_request(top_k=3)).top_k.tolist() == [VOCAB, 3]


def test_what_changes_from_step_to_step_is_told_anew():
    """Output grows, min_tokens is reached; everything else is the same as in a batch of its own."""
    requests = [
        make_request(min_tokens=1, stop_ids=(2,), logit_bias={3: 1.0}),
        make_request(frequency_penalty=0.5, logprobs=1),
        make_request(temperature=0.0),
    ]
    table = make_table(3)
    for num_output, token_id in enumerate((5, 6, 7)):
        kept, fresh = step(table, requests), build(*requests)
        for field in dataclasses.fields(kept):
            one, other = getattr(kept, field.name), getattr(fresh, field.name)
            if isinstance(one, torch.Tensor) and field.name not in ("out_ids", "logits", "workspace", "seen"):
                assert one.tolist() == other.tolist(), field.name
        assert kept.positions.tolist() == [num_output] * 3
        assert len(ragged(kept.bias_ids, kept.bias_indptr)[0]) == (1 if num_output else 2)
        for request in requests:
            request.token_ids[request.num_known] = token_id
            request.num_known += 1


def same_rows(one, other) -> bool:
    of_a_step = ("logits", "workspace", "seen", "out_ids")
    for field in dataclasses.fields(one):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if (
            isinstance(mine, torch.Tensor)
            and field.name not in of_a_step
            and mine.tolist() != theirs.tolist()
        ):
            return False
    return True


def test_any_choice_of_requests_reads_as_a_table_of_its_own():
    """Some are drawn for, others not, new ones come and old ones go, one may come twice."""
    draw = random.Random(0)
    table, running = make_table(4), []
    for number in range(200):
        if len(running) < 4 and draw.random() < 0.4:
            new = make_request(
                prompt=range(draw.randint(1, 9)),
                seed=number,
                choice=draw.randint(0, 3),
                temperature=draw.random(),
                top_k=draw.choice([-1, 5, 2**62]),
                frequency_penalty=draw.choice([0.0, 0.0, 0.0, 0.5]),
                logprobs=draw.choice([None, None, 0, 3]),
                min_tokens=draw.choice([0, 0, 3]),
                stop_ids=(2,),
            )
            running.append(new)
        elif running and draw.random() < 0.2:
            running.remove(draw.choice(running))
        chosen = draw.choices(running, k=draw.randint(1, 6)) if running else []
        if chosen:
            assert same_rows(step(table, chosen), build(*chosen))


def test_a_table_forgets_requests_that_do_not_come_again():
    table, first = make_table(2), make_request()
    num_held = sys.getrefcount(first)
    step(table, [first])
    assert sys.getrefcount(first) > num_held
    for _ in range(2):
        step(table, [make_request()])
    assert sys.getrefcount(first) == num_held


def test_a_table_with_room_lets_go_of_those_that_ended():
    """They hold no block; a prompt may be long, and a table is as large as the largest step."""
    table, ended, pausing = make_table(256), make_request(), make_request()
    pausing.num_blocks = 1
    num_held = sys.getrefcount(ended), sys.getrefcount(pausing)
    step(table, [ended, pausing])
    step(table, [make_request()])
    assert sys.getrefcount(ended) == num_held[0] < num_held[1] + 1 == sys.getrefcount(pausing)


def test_what_does_not_change_from_step_to_step_is_made_once():
    requests = [make_request(temperature=0.5, seed=4), make_request(output=(5,), top_k=3)]
    table = make_table(2)
    logits = torch.zeros(2, VOCAB)
    mask = np.zeros((2, 2), np.int32)

    def tensors(of: torch.Tensor, bitmask=None):
        draws = [Draw(request, request.num_known) for request in requests]
        return dataclasses.replace(table.tensors(draws, of, bitmask))

    first = tensors(logits)
    for request in requests:
        request.num_known += 1
    assert first.positions.tolist() == [0, 1]
    second, third = tensors(logits, mask), tensors(logits)
    assert second.positions.tolist() == [1, 2]
    assert second.bitmask is not None and first.bitmask is None and third.bitmask is None
    assert second.out_ids is not first.out_ids, "they may not have been read yet"
    assert second.temperature is first.temperature and second.workspace is first.workspace
    assert len(second.workspace) == len(second.seen) == len(second.out_ids) == 2
    other = torch.zeros(2, VOCAB)
    assert tensors(other).logits is other


@pytest.mark.parametrize("params", [{"presence_penalty": 1.0}, {"logit_bias": {1: 2.0}}, {"logprobs": 0}])
def test_what_changes_is_made_anew(params):
    table, requests = make_table(1), [make_request(output=(5,), **params)]
    assert step(table, requests).out_logprobs is not step(table, requests).out_logprobs


def test_a_table_holds_the_logits_of_one_step_alone():
    """They may be large, and each number of rows has arrays of its own."""
    table, requests = make_table(2), [make_request(), make_request()]
    first = table.tensors([Draw(requests[0], 3)], torch.zeros(1, VOCAB))
    assert first.logits is not None
    step(table, requests)
    assert first.logits is None


def test_arrays_of_few_sizes_are_kept():
    """Those of every number of rows that ever came would be a lot to hold."""
    requests = [make_request(seed=seed) for seed in range(3 * MOST_ROOMS)]
    table = make_table(len(requests), len(requests))
    for count in [*range(1, len(requests) + 1), 1, 2]:
        tensors = step(table, requests[:count])
        assert tensors.seeds.tolist() == list(range(count)), "also of a size that came before"
        assert len(table._rooms) <= MOST_ROOMS
