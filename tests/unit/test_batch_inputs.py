"""The arrays of a step against the same written token by token."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.runner.batch_inputs import BatchInputs
from engine.sampling.params import SamplingParams
from engine.scheduling.request import Request
from engine.scheduling.step_plan import StepPlan, StepRow

MAX_POSITIONS = 100


def make_request(generator: np.random.Generator, num_known: int, num_blocks: int) -> Request:
    return Request(
        request_id="r",
        choice=0,
        params=SamplingParams(),
        seed=0,
        namespace="",
        token_ids=generator.integers(0, 1000, MAX_POSITIONS).astype(np.int32),
        block_table=generator.integers(0, 2**20, num_blocks).astype(np.int32),
        prompt_len=num_known,
        num_known=num_known,
        max_known=MAX_POSITIONS,
        arrival=0,
        num_blocks=num_blocks,
    )


@st.composite
def plans(draw):
    block_size = draw(st.sampled_from([1, 3, 16]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        start = draw(st.integers(0, MAX_POSITIONS - 1))
        num_tokens = draw(st.integers(1, MAX_POSITIONS - start))
        request = make_request(generator, start + num_tokens, -(-(start + num_tokens) // block_size))
        samples = draw(st.booleans())
        scored = draw(st.integers(start, start + num_tokens - samples))
        scored = range(scored, draw(st.integers(scored, start + num_tokens - samples)))
        num_drafts = draw(st.integers(0, num_tokens - 1)) if samples else 0
        rows.append(StepRow(request, start, num_tokens, samples, scored, num_drafts))
    return block_size, StepPlan(rows)


@given(st.lists(plans(), min_size=1, max_size=3))
def test_every_token_is_where_it_belongs(steps):
    for block_size, plan in steps:
        builder = BatchInputs(max_tokens=500, max_rows=5, max_positions=MAX_POSITIONS, block_size=block_size)
        for _ in range(2):  # nothing may be left of the step before
            inputs = builder.build(plan)
        tokens, positions, slots, logit_rows, scored_rows = [], [], [], [], []
        for index, row in enumerate(plan.rows):
            for position in range(row.start, row.start + row.num_tokens):
                block_id = int(row.request.block_table[position // block_size])
                if position in row.scored:
                    scored_rows.append(len(tokens))
                tokens.append(int(row.request.token_ids[position]))
                positions.append(position)
                slots.append(block_id * block_size + position % block_size)
            if row.samples:
                logit_rows += range(len(tokens) - 1 - row.num_drafts, len(tokens))
            assert inputs.plan.cu_seqlens_q[index + 1] == len(tokens)
            assert inputs.plan.kv_lens[index] == row.start + row.num_tokens
            used = row.request.block_table[: row.request.num_blocks].tolist()
            assert inputs.plan.block_tables[index, : len(used)].tolist() == used
        assert inputs.plan.cu_seqlens_q[0] == 0
        assert inputs.token_ids.tolist() == tokens
        assert inputs.positions.tolist() == positions
        assert inputs.slot_ids.tolist() == slots
        assert inputs.logit_rows.tolist() == logit_rows + scored_rows
        assert inputs.num_scored == len(scored_rows)
        assert inputs.slot_ids.dtype == inputs.logit_rows.dtype == torch.int64
        assert inputs.token_ids.dtype == inputs.positions.dtype == torch.int32


def test_slots_beyond_32_bits():
    request = make_request(np.random.default_rng(0), 1, 1)
    request.block_table[0] = 2**31 - 1
    builder = BatchInputs(max_tokens=1, max_rows=1, max_positions=16, block_size=16)
    assert builder.build(StepPlan([StepRow(request, 0, 1, True)])).slot_ids.tolist() == [(2**31 - 1) * 16]
