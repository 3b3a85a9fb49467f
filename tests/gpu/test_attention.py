"""Decode attention and append_kv as the GPU runs them, against the reference and the emulator."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from engine.ops.cuda.attention import rope_append_kv
from helpers.cuda_host import emulated_ops
from ops.test_cuda_append_kv import FORMATS as APPENDED_FORMATS
from ops.test_cuda_append_kv import arguments, assert_same
from ops.test_cuda_decode_attention import (
    BF16,
    FLOAT8,
    FORMATS,
    LENGTHS,
    DeviceCase,
    attend,
    check,
    device_case,
)

pytestmark = pytest.mark.gpu


def on_gpu(case: DeviceCase) -> DeviceCase:
    """The same on the GPU; what the reference reads stays."""
    moved = {
        field.name: getattr(case.plan, field.name).cuda()
        for field in dataclasses.fields(case.plan)
        if isinstance(getattr(case.plan, field.name), torch.Tensor)
    }
    scales = None if case.kv_scales is None else case.kv_scales.cuda()
    caches = tuple(cache.cuda() for cache in case.caches)
    plan = dataclasses.replace(case.plan, **moved)
    return dataclasses.replace(case, q=case.q.cuda(), caches=caches, kv_scales=scales, plan=plan)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 160, 256])
@pytest.mark.parametrize(("dtype", "stored"), FORMATS)
def test_decode_is_the_reference(dtype, stored, head_dim):
    case = device_case([*LENGTHS, 5000], dtype, stored, heads=8, kv_heads=2, head_dim=head_dim)
    check(on_gpu(case))


@pytest.mark.parametrize("group", [1, 7, 8, 20])
@pytest.mark.parametrize("window", [0, 5, 300])
@pytest.mark.parametrize("stored", [BF16, FLOAT8])
def test_decode_with_windows_caps_and_sinks(stored, window, group):
    case = device_case(LENGTHS, BF16, stored, heads=2 * group, kv_heads=2, head_dim=128, block_size=32)
    check(on_gpu(case), window=window, softcap=30.0, sinks=torch.linspace(-3, 9, 2 * group))


def test_contexts_of_more_splits_than_there_are():
    check(on_gpu(device_case([64 * 256 + 1, 100_000], BF16, BF16, heads=4, kv_heads=1, head_dim=64)))


def test_bits_are_the_same_every_time():
    """Whichever block of a row comes last."""
    case = on_gpu(device_case([4096] * 16 + LENGTHS, BF16, BF16, heads=16, kv_heads=4, head_dim=128))
    expected = attend(case)
    for _ in range(50):
        assert torch.equal(attend(case), expected)


@pytest.mark.parametrize(("dtype", "stored"), APPENDED_FORMATS)
@pytest.mark.parametrize(("head_dim", "half"), [(64, 32), (80, 20), (128, 64), (256, 128)])
def test_appending_gives_the_bits_of_the_emulator(dtype, stored, head_dim, half):
    here, there = (arguments(dtype, stored, tokens=40, head_dim=head_dim, half=half) for _ in range(2))
    there = {name: None if tensor is None else tensor.cuda() for name, tensor in there.items()}
    with emulated_ops():
        rope_append_kv(None, **here)
    rope_append_kv(None, **there)
    for name in ("q", "k_cache", "v_cache", "kv_scales"):
        assert_same(None if there[name] is None else there[name].cpu(), here[name])
