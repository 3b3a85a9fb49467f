"""append_kv and rope_append_kv of the CUDA backend, run by the emulator, against their references."""

from __future__ import annotations

import pytest
import torch

from engine.errors import NativeError
from engine.ops import reference
from engine.ops.cuda.attention import append_kv, rope_append_kv
from helpers.cuda_host import emulated, emulated_ops

FLOAT8 = torch.float8_e4m3fn
FORMATS = [
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.float16, None),
    (torch.bfloat16, FLOAT8),
    (torch.float32, FLOAT8),
]
NUM_BLOCKS, BLOCK_SIZE, NUM_POSITIONS = 4, 16, 50


@pytest.fixture(autouse=True, params=[False, True], ids=["forwards", "backwards"])
def ops(request):
    with emulated_ops() as module:
        module.run_backwards(request.param)
        yield
        module.run_backwards(False)


def arguments(dtype, stored, *, tokens=5, heads=3, kv_heads=2, head_dim=64, half=32, seed=0) -> dict:
    """q, k and v are columns of one tensor, as in a model; the caches hold one layer of two."""
    random = torch.Generator().manual_seed(seed)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim, generator=random).to(dtype)
    angles = 3 * torch.randn(NUM_POSITIONS, half, generator=random)
    shape = NUM_BLOCKS, 2, kv_heads, BLOCK_SIZE, head_dim
    scales = torch.full((NUM_BLOCKS, 2, kv_heads, 2, BLOCK_SIZE), 7.0)
    return {
        "q": qkv[:, :heads],
        "k": qkv[:, heads : heads + kv_heads],
        "v": qkv[:, heads + kv_heads :],
        "cos": angles.cos(),
        "sin": angles.sin(),
        "positions": torch.randint(NUM_POSITIONS, (tokens,), generator=random).int(),
        "k_cache": torch.full(shape, 7.0).to(stored or dtype)[:, 1],
        "v_cache": torch.full(shape, 7.0).to(stored or dtype)[:, 1],
        "slot_ids": torch.randperm(NUM_BLOCKS * BLOCK_SIZE, generator=random)[:tokens],
        "kv_scales": scales[:, 1] if stored else None,
    }


APPENDED = "k", "v", "k_cache", "v_cache", "slot_ids", "kv_scales"


def codes_of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp8 codes [T, G, D] and scales [T, G] of float32 x."""
    largest = x.abs().amax(-1)
    is_zero = largest < 1e-35
    # Not 448 / largest: torch multiplies by the reciprocal, which rounds twice.
    factor = torch.where(is_zero, 0, torch.full_like(largest, 448) / largest)
    codes = (x * factor[..., None]).to(FLOAT8)
    scales = torch.where(is_zero, 0, largest / 448)
    return codes, scales.masked_fill(~x.isfinite().all(-1), float("nan"))


def store(args: dict, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    """What the caches and scales hold afterwards."""
    blocks, offsets = args["slot_ids"] // BLOCK_SIZE, args["slot_ids"] % BLOCK_SIZE
    caches = [args["k_cache"].clone(), args["v_cache"].clone()]
    scales = None if args["kv_scales"] is None else args["kv_scales"].clone()
    for which, (cache, x) in enumerate(zip(caches, (k, v), strict=True)):
        if scales is not None:
            x, scales[blocks, :, which, offsets] = codes_of(x.float())
        # Not every operation knows fp8; its bits are copied.
        bits = torch.uint8 if scales is not None else cache.dtype
        cache.view(bits)[blocks, :, offsets] = x.to(cache.dtype).view(bits)
    return [*caches, scales]


def assert_same(actual: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    if actual is None or expected is None:
        assert actual is expected
        return
    assert torch.equal(actual.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def assert_neighbours_untouched(args: dict) -> None:
    for name in ("k_cache", "v_cache", "kv_scales"):
        if args[name] is not None:
            assert (args[name]._base[:, 0].float() == 7).all(), f"another layer of {name} was written"


@pytest.mark.parametrize(("dtype", "stored"), FORMATS)
@pytest.mark.parametrize(("head_dim", "kv_heads"), [(16, 1), (64, 2), (80, 3), (128, 2), (256, 1)])
def test_append_kv_is_the_reference(dtype, stored, head_dim, kv_heads):
    args = arguments(dtype, stored, tokens=9, kv_heads=kv_heads, head_dim=head_dim)
    expected = store(args, args["k"], args["v"])
    append_kv(None, *(args[name] for name in APPENDED))
    for name, wanted in zip(("k_cache", "v_cache", "kv_scales"), expected, strict=True):
        assert_same(args[name], wanted)
    assert_neighbours_untouched(args)


@pytest.mark.parametrize(("dtype", "stored"), FORMATS)
@pytest.mark.parametrize(("head_dim", "half"), [(64, 32), (64, 16), (80, 20), (96, 5), (128, 64), (256, 128)])
def test_rope_append_kv_is_the_two_ops(dtype, stored, head_dim, half):
    """In float32, of which the result is rounded once."""
    args = arguments(dtype, stored, tokens=6, head_dim=head_dim, half=half)
    q, k = args["q"].float().clone(), args["k"].float().clone()
    reference.rope(None, q, k, args["cos"], args["sin"], args["positions"])
    # The reference turns in float64: the op's bits are those of float32 arithmetic, as transformers' are.
    c, s = (args[name][args["positions"].long()][:, None] for name in ("cos", "sin"))
    for turned, x in ((q, args["q"].float()), (k, args["k"].float())):
        first, second = x[..., :half], x[..., half : 2 * half]
        turned_here = torch.cat([first * c - second * s, second * c + first * s], -1)
        torch.testing.assert_close(turned_here, turned[..., : 2 * half], rtol=1e-6, atol=1e-6)
        turned[..., : 2 * half] = turned_here
    expected = store(args, k, args["v"])
    kept = args["k"].clone()
    rope_append_kv(None, **args)
    assert_same(args["q"], q.to(dtype))
    assert_same(args["k"], kept)
    for name, wanted in zip(("k_cache", "v_cache", "kv_scales"), expected, strict=True):
        assert_same(args[name], wanted)
    assert_neighbours_untouched(args)


@pytest.mark.parametrize("name", ["cos", "sin"])
def test_tables_may_begin_anywhere(name):
    """At four bytes beyond a multiple of 16: the emulator refuses a longer load from there."""
    args, expected = (arguments(torch.bfloat16, None) for _ in range(2))
    shifted = torch.empty(args[name].numel() + 1)[1:].view(args[name].shape).copy_(args[name])
    assert shifted.data_ptr() % 16 == 4
    rope_append_kv(None, **(args | {name: shifted}))
    rope_append_kv(None, **expected)
    for written in ("q", "k_cache", "v_cache"):
        assert_same(args[written], expected[written])


@pytest.mark.parametrize("stored", [None, FLOAT8])
def test_tokens_outside_the_cache_are_not_stored(stored):
    args = arguments(torch.bfloat16, stored, tokens=4)
    args["slot_ids"] = torch.tensor([-1, NUM_BLOCKS * BLOCK_SIZE, 3, -(2**63)])
    args["positions"] = torch.tensor([0, 1, 2, NUM_POSITIONS], dtype=torch.int32)
    untouched = args["q"][3].clone()
    stored_slots = []
    rope_append_kv(None, **args)
    assert_same(args["q"][3], untouched)
    for name in ("k_cache", "v_cache"):
        changed = (args[name].float() != 7).flatten(2).any(2).any(1)
        stored_slots.append(changed.nonzero().flatten().tolist())
    assert stored_slots == [[0], [0]]
    assert (args["k_cache"][0].float() != 7).any(-1).nonzero()[:, 1].unique().tolist() == [3]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_head_that_is_not_finite_has_no_scale(bad):
    args = arguments(torch.bfloat16, FLOAT8, tokens=3)
    args["slot_ids"] = torch.arange(3)
    args["k"][1, 0, 5] = args["v"][2, 1, 63] = bad
    args["k"][0] = 0
    append_kv(None, *(args[name] for name in APPENDED))
    expected = torch.zeros(2, 2, BLOCK_SIZE, dtype=torch.bool)
    expected[0, 0, 1] = expected[1, 1, 2] = True
    assert torch.equal(args["kv_scales"][0].isnan(), expected)
    assert (args["kv_scales"][0, :, 0, 0] == 0).all() and (args["k_cache"][0, :, 0].float() == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, FLOAT8])
def test_the_emulator_rounds_as_torch_does(dtype):
    """All signs and exponents with the mantissas around a tie, stored as `dtype`."""
    uppers = torch.arange(0, 2**16, 7, dtype=torch.int64)
    lowers = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (uppers[:, None] << 16 | lowers[None, :]).flatten()
    numbers = torch.where(bits >= 2**31, bits - 2**32, bits).int().view(torch.float32)
    actual = emulated().round_to(numbers.numpy(), str(dtype).removeprefix("torch."))
    # torch before saturation: beyond 448 an fp8 is NaN.
    limit = 448.0 if dtype == FLOAT8 else float("inf")
    expected = numbers.clamp(-limit, limit).to(dtype).float()
    actual = torch.from_numpy(actual)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual[~actual.isnan()], expected[~expected.isnan()])


def test_no_tokens():
    args = arguments(torch.bfloat16, None, tokens=0)
    rope_append_kv(None, **args)
    assert (args["k_cache"] == 7).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slot_ids": torch.zeros(5, dtype=torch.int32)}, "slot_ids: expected int64, got int32"),
        ({"v": torch.zeros(5, 2, 64)}, "v: expected bfloat16, got float32"),
        ({"q": torch.zeros(5, 3, 32).bfloat16()}, r"q: expected \[T=5, H, D=64\]"),
        (
            {"k": torch.zeros(5, 131).bfloat16()[:, 3:].unflatten(1, (2, 64))},
            "k: expected rows at",
        ),
        ({"k_cache": torch.zeros(4, 2, 64, 16).bfloat16()}, "k_cache: expected"),
        ({"k_cache": torch.zeros(4, 2, 16, 64).to(FLOAT8)}, "k_cache: expected bfloat16, got float8_e4m3fn"),
        ({"kv_scales": torch.zeros(4, 2, 2, 16)}, "k_cache: expected float8_e4m3fn, got bfloat16"),
        ({"cos": torch.zeros(50, 33), "sin": torch.zeros(50, 33)}, "cos: expected at most D/2=32 columns"),
    ],
)
def test_wrong_arguments_are_refused_and_change_nothing(change, message):
    args = arguments(torch.bfloat16, None)
    kept, q = args["k_cache"], args["q"].clone()
    with pytest.raises(NativeError, match=message):
        rope_append_kv(None, **args | change)
    assert (kept == 7).all() and torch.equal(args["q"], q)
