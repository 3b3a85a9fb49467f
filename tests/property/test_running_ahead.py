"""Steps launched before the tokens of the one before are known: the same answers, whatever is asked."""

from __future__ import annotations

import random

import pytest

from engine import LLM
from helpers.late_device import LateDevice
from property.test_speculative import FEW_BLOCKS, answers, drawn_request


@pytest.fixture(scope="module", params=[{}, {"disable_jump_forward": True}], ids=["jumps", "steps"])
def engines(request):
    """Without and with a device that computes late, with few blocks, so that requests are preempted."""
    options = FEW_BLOCKS | request.param
    with LLM(**options) as plain, LLM(**options) as ahead:
        core = ahead._core
        core._runner = LateDevice(core._runner)
        core._scheduler._under_way._runs_ahead = True  # which the CPU's own way of running has no use for
        yield plain, ahead


@pytest.mark.parametrize("seed", range(4))
def test_both_ways_give_the_same_answers(engines, seed):
    """Constraints, thoughts, adapters, penalties, filters, stop strings and scores, with n choices."""
    plain, ahead = engines
    draw = random.Random(900 + seed)
    requests = [drawn_request(draw) for _ in range(24)]
    if seed % 2:
        requests = [request for request in requests if request[1].constraint is None]
    n = 1 + seed // 2
    device = ahead._core._runner
    late_rows, late_masks = device.num_late_rows, device.num_late_masks
    assert answers(ahead, requests, n) == answers(plain, requests, n)
    assert device.num_late_rows > late_rows + 100
    assert device.num_late_masks > late_masks + 20 or seed % 2


def test_they_were_preempted_while_they_ran_ahead(engines):
    plain, ahead = engines
    draw = random.Random(950)
    requests = [drawn_request(draw) for _ in range(24)]
    assert answers(ahead, requests, 2) == answers(plain, requests, 2)
    stats = ahead._core.stats()
    assert stats.num_preemptions > 0 and stats.num_blocks_in_use == 0
    assert stats.output_tokens == plain._core.stats().output_tokens
