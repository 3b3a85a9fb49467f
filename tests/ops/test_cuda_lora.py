"""Adapters of the CUDA backend against their reference, and promise P1 on them."""

from __future__ import annotations

import pytest
import torch

from engine.errors import NativeError
from engine.ops import reference
from engine.ops.cuda import low_rank as cuda_lora
from helpers.compare import assert_close, assert_same_bits, sum_bound
from helpers.low_rank import make_adapter, make_plan, normal, site_of
from helpers.triton_kernels import DEVICE, context

UNIT_ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
WORKSPACE = 20_000
TILE = cuda_lora.TILE_ROWS


def adapters_of(ops, dtype: str, sites: list, count: int) -> list:
    with torch.device(DEVICE if ops is cuda_lora else "cpu"):
        return [make_adapter(ops, dtype, sites, seed) for seed in range(count)]


def add(
    x: torch.Tensor, site: int, plan, out: torch.Tensor, token_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """What the op makes of `out`, which lies in wider rows, with a workspace full of NaN."""
    wide = torch.full((len(out), out.shape[1] + 3), 77.0, dtype=out.dtype, device=DEVICE)
    place = wide[:, : out.shape[1]].copy_(out)
    workspace = torch.full((WORKSPACE,), float("nan"), device=DEVICE)
    if token_ids is None:
        cuda_lora.lora(context(), x.to(DEVICE), site, plan, workspace, place)
    else:
        cuda_lora.lora_embedding(context(), token_ids.to(DEVICE), site, plan, workspace, place)
    assert (wide[:, out.shape[1] :] == 77.0).all()
    return place.cpu()


def check(
    dtype: str, site, rows_of_each: list[list[int]], num_rows: int, out_dtype: str | None = None
) -> None:
    in_features, is_embedding, modules = site
    kind, out_kind = (getattr(torch, name) for name in (dtype, out_dtype or dtype))
    num_columns = max(first + count for first, count, _, _ in modules) + 3
    x = normal(num_rows, in_features + 5)[:, 2 : in_features + 2].to(kind)
    token_ids = torch.arange(num_rows, dtype=torch.int32) * 7 % in_features if is_embedding else None
    before = normal(num_rows, num_columns, seed=9).to(out_kind)
    count = len(rows_of_each)
    plan = make_plan(cuda_lora, adapters_of(cuda_lora, dtype, [site], count), rows_of_each)
    plain = make_plan(reference, adapters_of(reference, dtype, [site], count), rows_of_each)

    def plainly(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if is_embedding:
            reference.lora_embedding(None, token_ids, 0, plain, None, out)
        else:
            reference.lora(None, x, 0, plain, None, out)
        return out

    expected = plainly(x, before.double())
    for adapter, _ in plain.rows_of_each:
        adapter.weights = {key: (a.abs(), b.abs()) for key, (a, b) in adapter.weights.items()}
    magnitude = plainly(x.abs(), before.abs().double())
    out = add(x, 0, plan, before, token_ids)
    rank = max(rank for _, _, rank, _ in modules)
    # Products and sums over k and over ranks, the scale, and the sum with what was there; the last rounding.
    bound = sum_bound(magnitude, in_features + 1 + rank + 1 + 1)
    bound += UNIT_ROUNDOFF[out_dtype or dtype] * (expected.abs() + bound)
    assert_close(out, expected, bound)
    alone = sorted(set(range(num_rows)) - {row for rows in rows_of_each for row in rows})
    assert out[alone].equal(before[alone])


@pytest.mark.parametrize(
    ("rank", "dtype"), [(1, "bfloat16"), (8, "float16"), (17, "float32"), (48, "bfloat16")]
)
def test_equals_reference_for_any_rank(rank, dtype):
    check(dtype, site_of(200, [(0, 70, rank)]), [[0, 2, 3], [5]], 6)


@pytest.mark.parametrize("in_features", [1, 127, 256, 300])
def test_equals_reference_for_any_input_size(in_features):
    check("bfloat16", site_of(in_features, [(0, 40, 5)]), [[1], [0, 3]], 4)


@pytest.mark.parametrize("num_columns", [1, cuda_lora.TILE_COLUMNS, cuda_lora.TILE_COLUMNS + 1])
def test_equals_reference_for_any_output_size(num_columns):
    check("float16", site_of(50, [(0, num_columns, 6)]), [[0], [1, 2]], 3)


def test_parts_of_a_fused_layer_with_ranks_and_scales_of_their_own():
    check("bfloat16", site_of(96, [(0, 33, 3), (40, 140, 20), (180, 17, 6)]), [[4], [0, 1, 2, 3]], 5)


def test_logits_of_float32_from_rows_of_the_models_dtype():
    check("bfloat16", site_of(64, [(0, 40, 4)]), [[0, 1]], 2, out_dtype="float32")


@pytest.mark.parametrize("num_rows", [1, TILE, 2 * TILE + 1])
def test_any_number_of_rows_in_any_order(num_rows):
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(num_rows)).tolist()
    half = num_rows // 3
    check("bfloat16", site_of(64, [(0, 48, 5)]), [order[:half], order[half : num_rows - 1], []], num_rows)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_embedding(dtype):
    check(dtype, site_of(300, [(0, 70, 70)], is_embedding=True), [[0, 2], [1, 5, 4]], 7)


def test_adapters_that_lack_a_site_leave_their_rows_alone():
    lacking, having = site_of(32, []), site_of(32, [(0, 16, 2)])
    with torch.device(DEVICE):
        adapters = [make_adapter(cuda_lora, "float32", [lacking, site], 0) for site in (lacking, having)]
    before = normal(2, 16)
    plan = make_plan(cuda_lora, adapters, [[0], [1]])
    assert add(normal(2, 32), 0, plan, before).equal(before)
    after = add(normal(2, 32), 1, plan, before)
    assert after[0].equal(before[0]) and not after[1].equal(before[1])


def test_a_row_has_the_same_bits_alone_and_in_any_batch():
    site = site_of(200, [(0, 90, 13), (90, 40, 16)])
    adapters = adapters_of(cuda_lora, "bfloat16", [site], 3)
    x, before = normal(50, 200).bfloat16(), normal(50, 130, seed=1).bfloat16()
    together = add(
        x, 0, make_plan(cuda_lora, adapters, [list(range(i, 50, 3))[::-1] for i in range(3)]), before
    )
    for row in (0, 7, 49):
        plan = make_plan(cuda_lora, [adapters[row % 3]], [[0]])
        alone = add(x[row : row + 1], 0, plan, before[row : row + 1])
        assert_same_bits(alone.float(), together[row : row + 1].float())


def test_wrong_calls_are_refused_by_name():
    site = site_of(32, [(0, 16, 4)])
    (adapter,) = adapters_of(cuda_lora, "float32", [site], 1)
    plan = make_plan(cuda_lora, [adapter], [[0, 1]])
    x, out = normal(2, 32).to(DEVICE), normal(2, 16).to(DEVICE)
    enough = torch.empty(8, device=DEVICE)

    def refused(match: str, call, *args) -> None:
        with pytest.raises(NativeError, match=match):
            call(*args)

    def refused_call(match: str, x=x, site=0, plan=plan, workspace=enough, out=out) -> None:
        refused(match, cuda_lora.lora, context(), x, site, plan, workspace, out)

    refused_call("site: expected 0 to 0, got 1", site=1)
    refused_call("site", site=-1)
    refused_call("workspace", workspace=torch.empty(7))
    refused_call("x: expected", x=x[:, :31])
    refused_call("x: expected the adapters'", x=x.bfloat16())
    refused_call("out: expected at least 16", out=out[:, :15])
    refused_call("plan: has row 1", x=x[:1], out=out[:1])
    ids = torch.zeros(2, dtype=torch.int32)
    refused("embedding", cuda_lora.lora_embedding, context(), ids, 0, plan, enough, out)
    refused("each row once", make_plan, cuda_lora, [adapter], [[1, 1]])
    refused("negative", make_plan, cuda_lora, [adapter], [[-1]])
    refused("cu_rows", cuda_lora.LoraPlan, [adapter], torch.tensor([0, 2]), torch.tensor([0]))
    refused("packed", make_plan, cuda_lora, [cuda_lora.LoraAdapter("float32", [site])], [[0]])
    refused("packed already", adapter.pack, 0, 0, normal(4, 32), normal(16, 4))
    refused("module", adapter.pack, 0, 1, normal(4, 32), normal(16, 4))
    refused("a: expected", cuda_lora.LoraAdapter("float32", [site]).pack, 0, 0, normal(4, 31), normal(16, 4))
    refused("dtype", cuda_lora.LoraAdapter, "int8", [site])
    refused("rank", cuda_lora.LoraAdapter, "float32", [site_of(32, [(0, 16, 0)])])
    refused("first_column", cuda_lora.LoraAdapter, "float32", [site_of(32, [(0, 16, 1), (8, 16, 1)])])


def test_an_id_that_the_embedding_lacks_reads_and_adds_nothing():
    site = site_of(10, [(0, 16, 4)], is_embedding=True)
    plan = make_plan(cuda_lora, adapters_of(cuda_lora, "float32", [site], 1), [[0, 1, 2]])
    before = normal(3, 16)
    ids = torch.tensor([10, -1, 3], dtype=torch.int32)
    after = add(before, 0, plan, before, ids)
    assert after[:2].equal(before[:2]) and not after[2].equal(before[2])
