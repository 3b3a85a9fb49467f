"""ops.lora against its reference on every instruction set, and promise P1 on it."""

from __future__ import annotations

import pytest
import torch

from engine.errors import NativeError
from engine.ops import native, reference
from helpers.compare import EPSILON, GuardedOutput, assert_close, assert_same_bits, sum_bound
from helpers.low_rank import make_adapter, make_plan, normal, site_of
from helpers.native import FMA_ISAS, ISAS, context

DTYPES = ["bfloat16", "float32"]
WORKSPACE = 200_000


def check(isa: str, dtype: str, site, rows_of_each: list[list[int]], num_rows: int, seed: int = 0) -> None:
    """One adapter for each list of rows; compares with the reference inside the bound of the sums."""
    in_features, is_embedding, modules = site
    num_columns = max((first + count for first, count, _, _ in modules), default=8) + 3
    x = normal(num_rows, in_features + 5)[:, 2 : in_features + 2]
    token_ids = torch.arange(num_rows, dtype=torch.int32) * 7 % in_features

    def call(ops, ctx, x, plan, workspace, out) -> None:
        if is_embedding:
            ops.lora_embedding(ctx, token_ids, 0, plan, workspace, out)
        else:
            ops.lora(ctx, x, 0, plan, workspace, out)

    plan, plain_plan = (
        make_plan(
            ops, [make_adapter(ops, dtype, [site], seed + i) for i in range(len(rows_of_each))], rows_of_each
        )
        for ops in (native, reference)
    )
    out = GuardedOutput(num_rows, num_columns)
    out.tensor.copy_(normal(num_rows, num_columns, seed=9))
    before = out.tensor.clone()
    expected = before.double()
    call(reference, None, x, plain_plan, None, expected)
    magnitude = before.abs().double()
    for adapter, _ in plain_plan.rows_of_each:
        adapter.weights = {key: (a.abs(), b.abs()) for key, (a, b) in adapter.weights.items()}
    call(reference, None, x.abs(), plain_plan, None, magnitude)

    call(native, context(isa), x, plan, torch.full((WORKSPACE,), float("nan")), out.tensor)
    rank = max((rank for _, _, rank, _ in modules), default=0)
    # Products and sums over k and over ranks, the scale, and the sum with what was there.
    bound = sum_bound(magnitude, -(-in_features // 32) + 6 + 1 + rank + 1 + 1)
    assert_close(out.tensor, expected, bound)
    out.assert_untouched_outside()
    alone = sorted(set(range(num_rows)) - {row for rows in rows_of_each for row in rows})
    assert_same_bits(out.tensor[alone], before[alone])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 3, 4, 8, 17, 100, 256])
def test_equals_reference_for_any_rank(isa, dtype, rank):
    check(isa, dtype, site_of(200, [(0, 70, rank)]), [[0, 2, 3], [5]], 6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features", [1, 15, 16, 17, 31, 32, 33, 63, 300])
def test_equals_reference_for_any_input_size(isa, dtype, in_features):
    check(isa, dtype, site_of(in_features, [(0, 40, 5)]), [[1], [0, 3]], 4)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("num_columns", [1, 15, 16, 17, 31, 32, 33, 64, 100])
def test_equals_reference_for_any_output_size(isa, num_columns):
    check(isa, "bfloat16", site_of(50, [(0, num_columns, 6)]), [[0], [1, 2]], 3)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "modules",
    [
        [(0, 64, 8), (64, 32, 8), (96, 32, 8)],
        [(0, 33, 3), (33, 10, 1), (43, 17, 6)],
        [(64, 32, 2)],
        [(0, 33, 5), (70, 9, 16)],
    ],
)
def test_parts_of_a_fused_layer(isa, dtype, modules):
    check(isa, dtype, site_of(96, modules), [[4], [0, 1, 2, 3]], 5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("num_rows", [0, 1, 2, 7, 8, 9, 31, 32, 33, 65, 100])
def test_any_number_of_rows_in_any_order(isa, num_rows):
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(num_rows)).tolist()
    half = num_rows // 2
    check(
        isa, "bfloat16", site_of(64, [(0, 48, 5)]), [order[:half], order[half : num_rows - 1], []], num_rows
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(isa, dtype):
    check(isa, dtype, site_of(300, [(0, 70, 9)], is_embedding=True), [[0, 2], [1, 5, 4]], 7)


def test_a_site_that_an_adapter_lacks_is_left_alone():
    sites = [site_of(32, []), site_of(32, [(0, 16, 2)])]
    plan = make_plan(native, [make_adapter(native, "float32", sites, 0)], [[0, 1]])
    out = normal(2, 16)
    before = out.clone()
    native.lora(context(ISAS[-1]), normal(2, 32), 0, plan, torch.empty(0), out)
    assert_same_bits(out, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_alone_and_in_any_batch_on_any_set_with_any_threads(dtype):
    site = site_of(333, [(0, 90, 13), (90, 40, 16)])
    adapters = [make_adapter(native, dtype, [site], seed) for seed in range(4)]
    x, base, workspace = normal(90, 333), normal(90, 130, seed=1), torch.empty(WORKSPACE)

    def rows_alone(ctx) -> torch.Tensor:
        out = base.clone()
        for row in range(90):
            plan = make_plan(native, [adapters[row % 4]], [[0]])
            native.lora(ctx, x[row : row + 1], 0, plan, workspace, out[row : row + 1])
        return out

    expected = rows_alone(context(FMA_ISAS[0], 1))
    everything = make_plan(native, adapters, [list(range(i, 90, 4))[::-1] for i in range(4)])
    for isa in FMA_ISAS:
        for num_threads in (1, 3):
            out = base.clone()
            native.lora(context(isa, num_threads), x, 0, everything, workspace, out)
            assert_same_bits(out, expected)
    for isa in set(ISAS) - set(FMA_ISAS):
        out = base.clone()
        native.lora(context(isa, 3), x, 0, everything, workspace, out)
        assert_same_bits(out, rows_alone(context(isa, 1)))


def test_weights_are_rounded_to_nearest_even():
    weight = torch.tensor([[1.0 + 2**-8, 1.0 + 3 * 2**-8, -(1.0 + 2**-8), 1.0]])
    adapter = native.LoraAdapter("bfloat16", [site_of(4, [(0, 1, 1)])])
    adapter.pack(0, 0, weight, torch.full((1, 1), 2.0))
    out = torch.zeros(4, 1)
    native.lora(
        context(ISAS[-1]), torch.eye(4), 0, make_plan(native, [adapter], [[0, 1, 2, 3]]), torch.empty(4), out
    )
    assert out[:, 0].tolist() == weight.bfloat16().float()[0].tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_takes_the_types_of_checkpoints_and_no_others(dtype):
    adapter = native.LoraAdapter("float32", [site_of(40, [(0, 33, 5)])])
    a, b = normal(5, 40).to(dtype), normal(33, 5).to(dtype)
    if dtype is torch.float64:
        with pytest.raises(NativeError, match="a: expected"):
            adapter.pack(0, 0, a, b)
        return
    adapter.pack(0, 0, a, b)
    out, expected = torch.zeros(2, 33), torch.zeros(2, 33, dtype=torch.float64)
    x = normal(2, 40)
    native.lora(context(ISAS[-1]), x, 0, make_plan(native, [adapter], [[0, 1]]), torch.empty(100), out)
    expected += 0.5 * (x.double() @ a.double().T) @ b.double().T
    assert_close(out, expected, torch.full_like(expected, 1e-4 + EPSILON))


def test_wrong_calls_are_refused_by_name():
    ctx = context(ISAS[-1])
    site = site_of(32, [(0, 16, 4)])
    adapter = make_adapter(native, "float32", [site], 0)
    plan = make_plan(native, [adapter], [[0, 1]])
    x, out, workspace = normal(2, 32), normal(2, 16), torch.empty(8)

    def refused(match: str, call) -> None:
        with pytest.raises(NativeError, match=match):
            call()

    refused("site", lambda: native.lora(ctx, x, 1, plan, workspace, out))
    refused("site", lambda: native.lora(ctx, x, -1, plan, workspace, out))
    refused("workspace", lambda: native.lora(ctx, x, 0, plan, torch.empty(7), out))
    refused("x: expected", lambda: native.lora(ctx, normal(2, 31), 0, plan, workspace, out))
    refused("out: expected at least 16", lambda: native.lora(ctx, x, 0, plan, workspace, normal(2, 15)))
    refused("plan: has row 1", lambda: native.lora(ctx, x[:1], 0, plan, workspace, out[:1]))
    refused("embedding", lambda: native.lora_embedding(ctx, torch.zeros(2).int(), 0, plan, workspace, out))
    refused("each row once", lambda: make_plan(native, [adapter], [[1, 1]]))
    refused("negative", lambda: make_plan(native, [adapter], [[-1]]))
    refused(
        "cu_rows", lambda: native.LoraPlan([adapter], torch.tensor([0, 2]).int(), torch.tensor([0]).int())
    )
    refused("packed", lambda: make_plan(native, [native.LoraAdapter("float32", [site])], [[0]]))
    refused("packed already", lambda: adapter.pack(0, 0, normal(4, 32), normal(16, 4)))
    refused("dtype", lambda: native.LoraAdapter("int8", [site]))
    refused("rank", lambda: native.LoraAdapter("float32", [site_of(32, [(0, 16, 0)])]))
    refused("module", lambda: adapter.pack(0, 1, normal(4, 32), normal(16, 4)))
    looked_up = make_adapter(native, "float32", [site_of(10, [(0, 16, 4)], is_embedding=True)], 0)
    plan = make_plan(native, [looked_up], [[0, 1]])
    for ids in ([0, 10], [-1, 0]):
        refused(
            "token_ids",
            lambda ids=ids: native.lora_embedding(ctx, torch.tensor(ids).int(), 0, plan, workspace, out),
        )
