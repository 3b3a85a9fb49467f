"""paged_attention that multiplies in bfloat16 (decision 0033), on every instruction set.

That bits do not depend on the batch, the chunks or the set is tested in test_paged_attention_bits.py.
"""

from __future__ import annotations

import pytest
import torch

from engine.ops import reference
from helpers.attention import BF16, FP32, INT8, MIX, AttentionCase, attend, both_ways, make_case
from helpers.compare import assert_same_bits
from helpers.native import FMA_ISAS, ISAS

ROUNDED = reference.ExecutionContext(rounds_attention=True)


def by_reference(ctx, case: AttentionCase, window: int, softcap: float, sinks=None) -> torch.Tensor:
    out = torch.empty(case.q.shape, dtype=torch.float64)
    numbers = (case.q.shape[2] ** -0.5, window, softcap)
    reference.paged_attention(ctx, case.q, case.k_cache, case.v_cache, case.plan, *numbers, out, sinks)
    return out


def check(case: AttentionCase, isa: str, window: int = 0, softcap: float = 0.0, sinks=None) -> None:
    """A weight that is nearly a tie may be rounded the other way: that is half a step of bfloat16 for few of
    them, and much less than what rounding makes out in all."""
    out = attend(case, isa, window=window, softcap=softcap, sinks=sinks, rounds=True).double()
    expected, exact = (by_reference(ctx, case, window, softcap, sinks) for ctx in (ROUNDED, None))
    values = torch.nan_to_num(case.v_cache.double()).abs().amax()
    assert (out - expected).abs().amax() <= values * 2**-7
    assert (out - expected).square().mean() <= (exact - expected).square().mean() / 9


@pytest.mark.parametrize("head_dim", range(16, 257, 48))
@pytest.mark.parametrize("block_size", [16, 32, 48])
@pytest.mark.parametrize("isa", ISAS)
def test_any_mix_of_rows_is_the_reference(isa, head_dim, block_size):
    for group in (1, 2, 7):
        check(make_case(MIX, heads=group, kv_heads=1, head_dim=head_dim, block_size=block_size), isa)


@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("window", [0, 1, 5, 64, 256, 257])
@pytest.mark.parametrize("isa", ISAS)
def test_windows_soft_caps_and_sinks_are_the_reference(isa, window, softcap):
    case = make_case([*MIX, (300, 555)], heads=3, kv_heads=1, head_dim=32, block_size=48)
    check(case, isa, window, softcap)
    check(case, isa, window, softcap, torch.tensor([-100.0, 0.0, 3.0]))
    check(both_ways(case), isa, window)


@pytest.mark.parametrize("window", [0, 1, 2, 7, 300])
@pytest.mark.parametrize("isa", ISAS)
def test_each_token_is_added_once(isa, window):
    """Equal scores and whole numbers: nothing is rounded but the mean."""
    case = make_case([(40, 40), (13, 600), (1, 1), (1, 258)], heads=3, kv_heads=1, head_dim=32)
    case.q.zero_()
    case.v_cache.copy_((8 * case.v_cache).round())
    exact = by_reference(None, case, window, 0.0)
    assert (attend(case, isa, window=window, rounds=True) - exact).abs().amax() <= 1e-5


@pytest.mark.parametrize("d", range(16))
@pytest.mark.parametrize("isa", ISAS)
def test_each_number_of_a_query_meets_its_own_of_the_keys(isa, d):
    case = make_case([(1, 600)], heads=2, kv_heads=1, head_dim=16)
    block, offset = int(case.plan.block_tables[0, 299 // 16]), 299 % 16
    case.q.zero_()
    case.q[0, 1, d] = 1e4
    case.k_cache.copy_(torch.nan_to_num(case.k_cache).clamp(-1, 1))
    case.k_cache[block, 0, d, offset] = 4.0
    out = attend(case, isa, rounds=True)
    assert_same_bits(out[0, 1], case.v_cache[block, 0, offset].float())


@pytest.mark.parametrize("isa", ISAS)
def test_queries_are_rounded_to_nearest_even(isa):
    """The key far above the others is the one whose score is the larger only after that rounding."""
    case = make_case([(1, 2)], heads=1, kv_heads=1, head_dim=16)
    case.k_cache.zero_()
    block = int(case.plan.block_tables[0, 0])
    case.k_cache[block, 0, :2, 0] = torch.tensor([1.0, 0.0]) * 2**15
    case.k_cache[block, 0, :2, 1] = torch.tensor([0.0, 1.0]) * 2**15
    for first, second, winner in [
        (1 + 2**-8, 1 + 2**-9, None),
        (1 + 2**-8 + 2**-20, 1.0, 0),
        (1 + 3 * 2**-8, 1 + 2**-7, 0),
        (-1 - 2**-8, -1 - 2**-8 - 2**-20, 0),
    ]:
        case.q[0, 0, :2] = torch.tensor([first, second])
        out = attend(case, isa, rounds=True)[0, 0]
        values = case.v_cache[block, 0, :2].float()
        assert_same_bits(out, values.mean(0) if winner is None else values[winner])


@pytest.mark.parametrize("isa", ISAS)
def test_not_a_number_spoils_its_own_rows_only(isa):
    case = make_case([(3, 300), (1, 40)], heads=4, kv_heads=2, head_dim=64)
    healthy = attend(case, isa, rounds=True)
    for bits in (0x7FC00000, 0x7FFFFFFF, -1):
        case.q[1, 2, 5] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        out = attend(case, isa, rounds=True)
        assert out[1, 2].isnan().all()
        out[1, 2] = healthy[1, 2]
        assert_same_bits(out, healthy)


@pytest.mark.parametrize("dtype", [FP32, INT8])
@pytest.mark.parametrize("isa", FMA_ISAS)
def test_other_caches_are_multiplied_as_ever(isa, dtype):
    case = make_case(MIX, heads=4, kv_heads=2, head_dim=64, dtype=dtype)
    assert_same_bits(attend(case, isa, rounds=True), attend(case, isa))


@pytest.mark.parametrize("isa", FMA_ISAS)
def test_rounding_is_asked_for(isa):
    case = make_case(MIX, heads=4, kv_heads=2, head_dim=64, dtype=BF16)
    assert not attend(case, isa, rounds=True).equal(attend(case, isa))
