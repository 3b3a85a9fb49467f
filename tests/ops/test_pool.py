"""pool against its reference, on every instruction set of the machine."""

from __future__ import annotations

import pytest
import torch

from engine.errors import NativeError
from engine.ops import reference
from engine.ops.pool import pool
from helpers.compare import GuardedOutput, assert_close, assert_same_bits, sum_bound
from helpers.native import FMA_ISAS, ISAS, context

MODES = ("sum", "weighted_sum", "max")
LENS = [3, 1, 0, 40]


def int32(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def cu(lens) -> torch.Tensor:
    return int32([0, *torch.tensor(lens).cumsum(0).tolist()])


@pytest.mark.parametrize("n", [1, 16, 17, 100])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("isa", ISAS)
def test_pool_is_the_reference(isa, mode, n):
    torch.manual_seed(n)
    x = torch.randn(sum(LENS), n + 3)[:, 1 : n + 1]
    out = GuardedOutput(len(LENS), n)
    out.tensor.copy_(torch.randn(len(LENS), n))
    before = out.tensor.clone()
    expected, starts = before.double(), int32([0, 5, 2, 7])
    pool(context(isa), x, cu(LENS), starts, mode, out.tensor)
    reference.pool(None, x, cu(LENS), starts, mode, expected)
    magnitudes = before.abs().double()
    reference.pool(None, x.abs(), cu(LENS), starts, mode, magnitudes)
    assert_close(out.tensor, expected, sum_bound(magnitudes, max(LENS) + 1))
    assert_same_bits(out.tensor[2], before[2])
    out.assert_untouched_outside()


@pytest.mark.parametrize("mode", MODES)
def test_bits_do_not_depend_on_pieces_batch_threads_or_instruction_set(mode):
    torch.manual_seed(1)
    x, lens = torch.randn(90, 50), [30, 60]
    whole = torch.zeros(2, 50)
    pool(context(FMA_ISAS[-1], 3), x, cu(lens), int32([0, 0]), mode, whole)
    for isa in FMA_ISAS:
        pieces = torch.zeros(1, 50)
        for start, end in ((0, 1), (1, 17), (17, 60)):
            pool(context(isa, 1), x[30 + start : 30 + end], cu([end - start]), int32([start]), mode, pieces)
        assert_same_bits(pieces, whole[1:])


def test_wrong_arguments_are_refused():
    x, out = torch.zeros(4, 8), torch.zeros(2, 8)
    with pytest.raises(NativeError, match="cu_rows: expected to go from 0 to T=4"):
        pool(context(ISAS[-1]), x, int32([0, 2, 3]), int32([0, 0]), "sum", out)
    with pytest.raises(NativeError, match="cu_rows: expected to ascend, got 1 at index 2"):
        pool(context(ISAS[-1]), x, int32([0, 4, 1]), int32([0, 0]), "sum", out)
    with pytest.raises(NativeError, match="mode: expected sum, weighted_sum or max, got 'min'"):
        pool(context(ISAS[-1]), x, int32([0, 2, 4]), int32([0, 0]), "min", out)
    with pytest.raises(NativeError, match=r"cu_rows: expected \[3\], got \[2\]"):
        pool(context(ISAS[-1]), x, int32([0, 4]), int32([0, 0]), "sum", out)
