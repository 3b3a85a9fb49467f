"""append_kv against its reference: every bit, and nothing but the slots that were named."""

from __future__ import annotations

import pytest
import torch

from engine.errors import NativeError
from engine.ops import reference
from engine.ops.append_kv import append_kv
from helpers.native import ISAS, context

DTYPES = [torch.bfloat16, torch.float32]
BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


def caches(dtype: torch.dtype, num_blocks: int, kv_heads: int, head_dim: int, block_size: int):
    """Both caches as one layer of a cache whose blocks hold several layers."""
    shapes = (kv_heads, head_dim, block_size), (kv_heads, block_size, head_dim)
    return [torch.full((num_blocks, 3, *shape), 7.0, dtype=dtype)[:, 1] for shape in shapes]


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    bits = BITS[actual.dtype]
    return torch.equal(actual.contiguous().view(bits), expected.contiguous().view(bits))


@pytest.mark.parametrize(
    ("kv_heads", "head_dim", "block_size"), [(1, 64, 16), (2, 80, 32), (3, 16, 256), (2, 5, 3)]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_append_kv_is_the_reference(isa, dtype, kv_heads, head_dim, block_size):
    torch.manual_seed(head_dim)
    num_blocks, num_tokens = 5, 2 * block_size + 1
    wide = torch.randn(num_tokens, 2 * kv_heads * head_dim + 3)
    k = wide[:, 3 : 3 + kv_heads * head_dim].unflatten(1, (kv_heads, head_dim))
    v = wide[:, 3 + kv_heads * head_dim :].unflatten(1, (kv_heads, head_dim))
    slot_ids = torch.randperm(num_blocks * block_size)[:num_tokens]
    actual = caches(dtype, num_blocks, kv_heads, head_dim, block_size)
    expected = [cache.clone() for cache in actual]
    append_kv(context(isa, 3), k, v, *actual, slot_ids)
    reference.append_kv(None, k, v, *expected, slot_ids)
    assert same_bits(actual[0], expected[0]) and same_bits(actual[1], expected[1])
    assert all((cache._base[:, [0, 2]] == 7).all() for cache in actual), "another layer was written"


@pytest.mark.parametrize("isa", ISAS)
def test_rounding_is_to_nearest_even_for_every_kind_of_number(isa):
    """All signs and exponents with the mantissas around a tie; infinity stays, NaN stays NaN."""
    uppers = torch.arange(0, 2**16, 3, dtype=torch.int64)
    lowers = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (uppers[:, None] << 16 | lowers[None, :]).flatten()
    numbers = torch.where(bits >= 2**31, bits - 2**32, bits).int().view(torch.float32)
    numbers = torch.cat([numbers, torch.tensor([float("inf"), -float("inf"), float("nan")])])
    numbers = torch.nn.functional.pad(numbers, (0, -len(numbers) % 16)).view(-1, 1, 16)
    k_cache, v_cache = caches(torch.bfloat16, -(-len(numbers) // 16), 1, 16, 16)
    append_kv(context(isa), numbers, numbers, k_cache, v_cache, torch.arange(len(numbers)))
    expected = numbers.flatten().bfloat16()
    for stored in (k_cache.transpose(2, 3).flatten(), v_cache.flatten()):
        stored = stored[: len(expected)]
        assert torch.equal(stored.isnan(), expected.isnan())
        assert same_bits(stored[~expected.isnan()], expected[~expected.isnan()])


@pytest.mark.parametrize(("kv_heads", "head_dim", "block_size"), [(1, 64, 16), (2, 80, 32), (2, 5, 3)])
@pytest.mark.parametrize("isa", ISAS)
def test_codes_and_scales_are_the_reference(isa, kv_heads, head_dim, block_size):
    torch.manual_seed(head_dim)
    num_blocks, num_tokens = 5, 2 * block_size + 1
    k, v = torch.randn(2, num_tokens, kv_heads, head_dim) * torch.logspace(-30, 30, num_tokens)[:, None, None]
    k[1], v[2] = 0, 1e-36  # too small to divide by
    k[3] = torch.arange(head_dim) - 127 + 0.5  # ties
    slot_ids = torch.randperm(num_blocks * block_size)[:num_tokens]
    caches = []
    for append, ctx in ((append_kv, context(isa, 3)), (reference.append_kv, None)):
        shapes = (kv_heads, head_dim, block_size), (kv_heads, block_size, head_dim)
        codes = [torch.full((num_blocks, *shape), 7, dtype=torch.int8) for shape in shapes]
        caches.append([*codes, torch.full((num_blocks, kv_heads, 2, block_size), 7.0)])
        append(ctx, k, v, *caches[-1][:2], slot_ids, caches[-1][2])
    for actual, expected in zip(*caches, strict=True):
        assert torch.equal(actual, expected)
    assert len(caches[0][2][caches[0][2] != 7]) == 2 * kv_heads * num_tokens


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("isa", ISAS)
def test_a_head_that_is_not_finite_has_no_scale(isa, bad):
    k, v = torch.ones(2, 3, 2, 16)
    k[1, 0, 5] = v[2, 1, 0] = bad
    keys, values = (torch.zeros(1, 2, 16, 16, dtype=torch.int8) for _ in range(2))
    scales = torch.zeros(1, 2, 2, 16)
    append_kv(context(isa), k, v, keys, values, torch.arange(3), scales)
    expected = torch.zeros(2, 2, 16, dtype=torch.bool)
    expected[0, 0, 1] = expected[1, 1, 2] = True
    assert torch.equal(scales[0].isnan(), expected)
    assert (scales[0, :, :, :3][~expected[:, :, :3]] == torch.tensor(1 / 127)).all()


def test_no_tokens():
    k_cache, v_cache = caches(torch.bfloat16, 2, 1, 16, 16)
    append_kv(
        context(ISAS[-1]),
        torch.empty(0, 1, 16),
        torch.empty(0, 1, 16),
        k_cache,
        v_cache,
        torch.empty(0).long(),
    )
    assert (k_cache == 7).all() and (v_cache == 7).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slot_ids": torch.tensor([0, 64])}, "slot_ids: expected 0 to 63, got 64 at index 1"),
        ({"slot_ids": torch.tensor([-1, 0])}, "slot_ids: expected 0 to 63, got -1 at index 0"),
        ({"slot_ids": torch.tensor([0, -(2**63)])}, "slot_ids: expected 0 to 63, got -9223372036854775808"),
        ({"slot_ids": torch.zeros(2, dtype=torch.int32)}, "slot_ids: expected int64, got int32"),
        ({"slot_ids": torch.zeros(3).long()}, r"slot_ids: expected \[T=2\], got \[3\]"),
        ({"v": torch.zeros(2, 2, 32)}, r"v: expected \[T=2, G=2, D=16\], got \[2, 2, 32\]"),
        ({"v": torch.zeros(2, 2, 16).bfloat16()}, "v: expected float32, got bfloat16"),
        ({"v_cache": torch.zeros(4, 2, 16, 16)}, "v_cache: expected bfloat16, got float32"),
        ({"v_cache": torch.zeros(4, 2, 32, 16).bfloat16()}, r"v_cache: expected \[N=4, G=2, S=16, D=16\]"),
        (
            {"k_cache": torch.zeros(4, 2, 16, 16).half()},
            "k_cache: expected bfloat16 or float32 or int8, got float16",
        ),
        (
            {"k_cache": torch.zeros(4, 2, 16, 16).bfloat16().transpose(2, 3)},
            "k_cache: expected contiguous rows",
        ),
    ],
)
def test_wrong_arguments_are_refused_and_change_nothing(change, message):
    args = {"k": torch.zeros(2, 2, 16), "v": torch.zeros(2, 2, 16), "slot_ids": torch.zeros(2).long()}
    args["k_cache"], args["v_cache"] = caches(torch.bfloat16, 4, 2, 16, 16)
    kept = args["k_cache"]
    with pytest.raises(NativeError, match=message):
        append_kv(context(ISAS[-1]), **args | change)
    assert (kept == 7).all()
