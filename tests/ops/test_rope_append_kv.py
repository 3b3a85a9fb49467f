"""rope_append_kv: every bit of rope and then append_kv; refused before anything is written."""

from __future__ import annotations

import pytest
import torch

from engine.errors import NativeError
from engine.ops.append_kv import append_kv
from engine.ops.rope import rope, rope_append_kv
from helpers.compare import assert_same_bits
from helpers.native import ISAS, context

NUM_BLOCKS, BLOCK_SIZE, NUM_POSITIONS = 4, 16, 50


def arguments(num_tokens: int, dtype: torch.dtype, head_dim: int, half: int) -> dict[str, torch.Tensor]:
    """q, k and v are columns of one tensor, as in a model."""
    generator = torch.Generator().manual_seed(num_tokens)
    qkv = torch.randn(num_tokens, 7, head_dim, generator=generator)
    angles = torch.randn(NUM_POSITIONS, half, generator=generator)
    is_int8 = dtype == torch.int8
    return {
        "q": qkv[:, :3],
        "k": qkv[:, 3:5],
        "v": qkv[:, 5:],
        "cos": angles.cos(),
        "sin": angles.sin(),
        "positions": torch.randint(NUM_POSITIONS, (num_tokens,), dtype=torch.int32, generator=generator),
        "k_cache": torch.full((NUM_BLOCKS, 2, head_dim, BLOCK_SIZE), 7).to(dtype),
        "v_cache": torch.full((NUM_BLOCKS, 2, BLOCK_SIZE, head_dim), 7).to(dtype),
        "slot_ids": torch.randperm(NUM_BLOCKS * BLOCK_SIZE, generator=generator)[:num_tokens],
        "kv_scales": torch.full((NUM_BLOCKS, 2, 2, BLOCK_SIZE), 7.0) if is_int8 else None,
    }


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("head_dim", "half"), [(64, 32), (80, 20)])
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 40])
def test_bits_are_those_of_the_two_ops(isa, dtype, head_dim, half, num_tokens):
    together, apart = (arguments(num_tokens, dtype, head_dim, half) for _ in range(2))
    rope_append_kv(context(isa, 3), **together)
    rope(context(isa), *(apart[name] for name in ("q", "k", "cos", "sin", "positions")))
    rest = "k", "v", "k_cache", "v_cache", "slot_ids", "kv_scales"
    append_kv(context(isa), *(apart[name] for name in rest))
    for name in ("q", "k", "v", "k_cache", "v_cache", "kv_scales"):
        if apart[name] is not None:
            assert_same_bits(together[name].contiguous(), apart[name].contiguous())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("positions", torch.tensor([0, 1, NUM_POSITIONS], dtype=torch.int32), "positions: expected 0 to 49"),
        ("slot_ids", torch.tensor([0, 1, 64]), "slot_ids: expected 0 to 63"),
        ("slot_ids", torch.tensor([0, 1]), r"slot_ids: expected \[T=3\]"),
        ("v", torch.zeros(4, 2, 64), r"v: expected \[T=3, G=2, D=64\]"),
        ("kv_scales", torch.zeros(1), "kv_scales: expected None"),
    ],
)
def test_a_refused_call_writes_nothing(name, value, message):
    args, untouched = (arguments(3, torch.float32, 64, 32) for _ in range(2))
    with pytest.raises(NativeError, match=message):
        rope_append_kv(context(ISAS[-1]), **args | {name: value})
    for name in ("q", "k", "v", "k_cache", "v_cache"):
        assert_same_bits(args[name].contiguous(), untouched[name].contiguous())
