"""Decode attention of the CUDA backend, run by the emulator, against the reference."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from engine.errors import NativeError
from engine.ops import reference
from engine.ops.cuda.attention import paged_attention
from engine.ops.cuda.plan import DevicePlan, split_rows
from engine.runner.memory import split_bytes
from helpers.attention import AttentionCase, bound, make_case
from helpers.compare import assert_close
from helpers.cuda_host import HostContext, emulated_ops

BF16, FP16, FP32, FLOAT8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
FORMATS = [(BF16, BF16), (FP16, FP16), (BF16, FLOAT8), (FP16, FLOAT8), (FP32, FP32), (FP32, FLOAT8)]
FAST = [(BF16, BF16), (BF16, FLOAT8)]
ROUNDING = {BF16: 2.0**-8, FP16: 2.0**-11, FP32: 2.0**-24}
LENGTHS = [1, 15, 16, 17, 64, 255, 256, 257, 600]


@pytest.fixture(autouse=True)
def ops():
    with emulated_ops() as module:
        yield module


@dataclasses.dataclass
class DeviceCase:
    """A case as the device has it, and the same in numbers for the reference."""

    q: torch.Tensor
    caches: tuple[torch.Tensor, torch.Tensor]
    kv_scales: torch.Tensor | None
    plan: DevicePlan
    plain: AttentionCase
    multiplied: torch.dtype


def device_case(lengths, dtype, stored, *, heads, kv_heads, head_dim, block_size=16, seed=0) -> DeviceCase:
    rows = [(1, length) for length in lengths]
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "block_size": block_size}
    case = make_case(rows, **sizes, dtype=FP32 if stored == FLOAT8 else stored, seed=seed)
    # float16 queries beside a cache of fp8 are multiplied as bfloat16: these are both.
    q = case.q.to(BF16).to(dtype)
    scales = None
    caches = [case.k_cache.transpose(2, 3).contiguous(), case.v_cache]
    numbers = [cache.double() for cache in caches]
    if stored == FLOAT8:
        largest = torch.stack([cache.abs().amax(-1) for cache in caches], 2)
        scales = largest / 448
        # What no token was written to stays NaN, its scale too.
        caches = [(cache / scales[:, :, i, :, None]).to(FLOAT8) for i, cache in enumerate(caches)]
        numbers = [cache.double() * scales[:, :, i, :, None].double() for i, cache in enumerate(caches)]
    decode_rows, tiles = split_rows(case.plan.cu_seqlens_q.numpy())
    plan = DevicePlan(
        case.plan.cu_seqlens_q,
        case.plan.kv_lens,
        case.plan.block_tables,
        decode_rows=torch.from_numpy(decode_rows),
        tiles=torch.from_numpy(tiles),
        max_decode_kv_len=max(lengths, default=0),
        max_kv_len=max(lengths, default=0),
    )
    plain = dataclasses.replace(
        case, q=q.double(), k_cache=numbers[0].transpose(2, 3).contiguous(), v_cache=numbers[1]
    )
    multiplied = BF16 if stored == FLOAT8 and dtype != FP32 else dtype
    return DeviceCase(q, tuple(caches), scales, plan, plain, multiplied)


def attend(case: DeviceCase, *, window=0, softcap=0.0, sinks=None, context=None) -> torch.Tensor:
    """Into columns of a wider tensor, of which the others must stay."""
    num_rows, heads, head_dim = case.q.shape
    shape, device = (num_rows, heads + 1, head_dim), case.q.device
    wide = torch.full(shape, float("nan"), dtype=case.q.dtype, device=device)
    wide[:, -1] = 7
    context = context or HostContext(device)
    arguments = case.plan, head_dim**-0.5, window, softcap, wide[:, :-1], sinks, case.kv_scales
    paged_attention(context, case.q, *case.caches, *arguments)
    assert (wide[:, -1] == 7).all(), "a neighbour was written"
    assert not context.arrivals.any(), "counters are not back at zero"
    return wide[:, :-1]


def check(case: DeviceCase, *, window=0, softcap=0.0, sinks=None) -> None:
    """Weights are rounded to what the tensor cores take, the result to its dtype; the rest is float32."""
    out = attend(
        case, window=window, softcap=softcap, sinks=None if sinks is None else sinks.to(case.q.device)
    )
    out = out.cpu()
    plain, scale = case.plain, case.q.shape[2] ** -0.5
    expected, magnitude = torch.empty(2, *case.q.shape, dtype=torch.float64)
    arguments = plain.plan, scale, window, softcap
    reference.paged_attention(None, plain.q, plain.k_cache, plain.v_cache, *arguments, expected, sinks)
    reference.paged_attention(None, plain.q, plain.k_cache, plain.v_cache.abs(), *arguments, magnitude, sinks)
    weights = 0.0 if case.q.dtype == FP32 else ROUNDING[case.multiplied] * magnitude
    result = ROUNDING[case.q.dtype] * (expected.abs() + magnitude * 2.0**-8)
    smallest = 2.0**-24 if case.q.dtype == FP16 else 0.0  # a weight or result below float16's normal numbers
    allowed = bound(plain, magnitude, softcap) + 1.01 * (weights + result)
    assert_close(out, expected, allowed + smallest * (1 + plain.v_cache.nan_to_num().abs().max()) * 600)


@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 96, 128, 160, 256])
@pytest.mark.parametrize(("dtype", "stored"), FORMATS)
def test_every_format_and_head_dim_is_the_reference(dtype, stored, head_dim):
    check(device_case([1, 17, 300], dtype, stored, heads=4, kv_heads=2, head_dim=head_dim))


@pytest.mark.parametrize("group", [1, 2, 7, 8, 9, 16, 20])
@pytest.mark.parametrize(("dtype", "stored"), FAST)
def test_groups_of_any_size(dtype, stored, group):
    check(device_case([33, 270], dtype, stored, heads=2 * group, kv_heads=2, head_dim=64, seed=group))


@pytest.mark.parametrize("block_size", [16, 32, 48, 256])
@pytest.mark.parametrize(("dtype", "stored"), FAST)
def test_any_mix_of_lengths_and_block_sizes(dtype, stored, block_size):
    check(device_case(LENGTHS, dtype, stored, heads=4, kv_heads=1, head_dim=64, block_size=block_size))


@pytest.mark.parametrize("softcap", [0.0, 0.5, 30.0])
@pytest.mark.parametrize("window", [1, 5, 64, 256, 257, 10**12])
@pytest.mark.parametrize(("dtype", "stored"), [*FAST, (FP32, FP32)])
def test_windows_and_soft_caps(dtype, stored, window, softcap):
    case = device_case([3, 256, 257, 555], dtype, stored, heads=3, kv_heads=1, head_dim=64)
    check(case, window=window, softcap=softcap)


@pytest.mark.parametrize("window", [0, 64])
@pytest.mark.parametrize(("dtype", "stored"), [*FAST, (FP32, FP32)])
def test_sinks(dtype, stored, window):
    sinks = torch.tensor([-100.0, -3.0, 0.0, 1.0, 3.0, 5.0, 9.0, 30.0])
    case = device_case([1, 40, 600], dtype, stored, heads=8, kv_heads=2, head_dim=64)
    check(case, window=window, sinks=sinks)


@pytest.mark.parametrize("length", [64 * 256, 64 * 256 + 1])
def test_contexts_of_more_splits_than_there_are(length):
    """Splits are longer from here on, and a lane's block ids are read anew in the middle of one."""
    check(device_case([length], BF16, BF16, heads=1, kv_heads=1, head_dim=16, block_size=64))


@pytest.mark.parametrize(("dtype", "stored"), FORMATS)
def test_bits_of_a_row_are_its_own(dtype, stored, ops):
    """Alone, beside others, with more splits allowed, and with threads run the other way round."""
    lengths = [40, 700, 300]
    case = device_case(lengths, dtype, stored, heads=4, kv_heads=2, head_dim=64)
    together = attend(case)
    try:
        ops.run_backwards(True)
        assert torch.equal(together, attend(case))
    finally:
        ops.run_backwards(False)
    looser = dataclasses.replace(case.plan, max_decode_kv_len=16 * case.plan.block_tables.shape[1])
    assert torch.equal(together, attend(dataclasses.replace(case, plan=looser)))
    for row, length in enumerate(lengths):
        alone = dataclasses.replace(
            case.plan,
            cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32),
            kv_lens=case.plan.kv_lens[row : row + 1],
            block_tables=case.plan.block_tables[row : row + 1],
            decode_rows=torch.zeros(1, dtype=torch.int32),
            max_decode_kv_len=length,
        )
        single = dataclasses.replace(case, plan=alone, q=case.q[row : row + 1])
        assert torch.equal(together[row], attend(single)[0])


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("dtype", "stored"), FAST)
def test_no_matrix_row_waits_for_banks_of_another(dtype, stored, head_dim, ops):
    before = ops.matrix_conflicts()
    attend(device_case([300], dtype, stored, heads=4, kv_heads=1, head_dim=head_dim))
    assert ops.matrix_conflicts() == before


def test_rows_of_longer_sequences_are_left_alone():
    case = device_case([40, 30], BF16, BF16, heads=2, kv_heads=1, head_dim=64)
    one = dataclasses.replace(case.plan, decode_rows=case.plan.decode_rows[1:])
    out = attend(dataclasses.replace(case, plan=one))
    assert out[0].isnan().all() and torch.equal(out[1], attend(case)[1])


@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize(("dtype", "stored"), FORMATS)
def test_a_query_that_is_not_a_number_spoils_its_own_head_only(dtype, stored, softcap):
    case = device_case([300, 40], dtype, stored, heads=4, kv_heads=2, head_dim=64)
    healthy = attend(case, softcap=softcap)
    case.q[1, 2, 5] = float("nan")
    out = attend(case, softcap=softcap)
    assert out[1, 2].isnan().all()
    out[1, 2] = healthy[1, 2]
    assert torch.equal(out, healthy)


def test_wrong_entries_of_a_plan_read_nothing_outside():
    """As padding of a graph may have them: nothing is written for such rows, and no block is looked up."""
    case = device_case([40, 30, 20], BF16, BF16, heads=2, kv_heads=1, head_dim=64)
    expected = attend(case)
    plan = dataclasses.replace(case.plan, decode_rows=torch.tensor([-1, 1, 3], dtype=torch.int32))
    out = attend(dataclasses.replace(case, plan=plan))
    assert out[[0, 2]].isnan().all() and torch.equal(out[1], expected[1])
    plan = dataclasses.replace(case.plan, block_tables=torch.full_like(case.plan.block_tables, 2**31 - 1))
    assert (attend(dataclasses.replace(case, plan=plan)) == 0).all()
    plan = dataclasses.replace(case.plan, kv_lens=torch.tensor([0, -5, 2**30], dtype=torch.int32))
    assert attend(dataclasses.replace(case, plan=plan)).isnan().all()


@pytest.mark.parametrize("length", [1, 256, 257, 4096, 16384, 16385, 131072])
def test_the_plan_of_memory_counts_what_splits_leave(length, ops):
    spec = SimpleNamespace(num_heads=32, head_dim=128)
    needed = 4 * ops.num_partials(7, length, 0, 32, 128)
    assert needed == (split_bytes(spec, 7, length) if length > 256 else 0)


def test_no_rows():
    case = device_case([], BF16, BF16, heads=2, kv_heads=1, head_dim=64)
    assert attend(case).shape == (0, 2, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 3, 64).bfloat16()}, "q: expected a multiple of G=2 heads, got 3"),
        ({"q": torch.zeros(1, 2, 64)}, "out: expected float32, got bfloat16"),
        ({"window": -1}, "window: expected 0 or more, got -1"),
        ({"softcap": float("nan")}, "softcap: expected 0 or more"),
        ({"max_kv_len": 10**6}, "max_kv_len: expected 0 to"),
        ({"arrivals": torch.zeros(1, dtype=torch.int32)}, "arrivals: expected 2 counters or more, got 1"),
        ({"partials": torch.zeros(0)}, "partials: expected"),
        ({"kv_lens": torch.zeros(1).long()}, "kv_lens: expected int32, got int64"),
    ],
)
def test_wrong_arguments_are_refused(change, message, ops):
    case = device_case([300], BF16, BF16, heads=2, kv_heads=2, head_dim=64)
    out = torch.full_like(case.q, 7)
    if "q" in change and change["q"].dtype == BF16:
        out = torch.full_like(change["q"], 7)
    arguments = {
        "q": case.q,
        "k_cache": case.caches[0],
        "v_cache": case.caches[1],
        "sequences": case.plan.decode_rows,
        "cu_seqlens_q": case.plan.cu_seqlens_q,
        "kv_lens": case.plan.kv_lens,
        "block_tables": case.plan.block_tables,
        "max_kv_len": 300,
        "scale": 0.1,
        "window": 0,
        "softcap": 0.0,
        "out": out,
        "sinks": None,
        "kv_scales": None,
        "partials": torch.zeros(2 * 2 * 68),
        "arrivals": torch.zeros(8, dtype=torch.int32),
    }
    with pytest.raises(NativeError, match=message):
        ops.decode_attention(**arguments | change)
    assert (out == 7).all()
