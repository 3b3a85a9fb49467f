"""Mixtures of experts of the CUDA backend, in one op, against each expert's products on its own."""

from __future__ import annotations

import pytest
import torch

from engine.errors import NativeError
from engine.ops import reference
from engine.ops.cuda.matrix import PackedMatrix
from engine.ops.cuda.mixture import ExpertMatrices, are_alike, experts
from helpers.compare import assert_same_bits
from helpers.low_rank import normal
from helpers.triton_kernels import DEVICE, context
from ops.test_cuda_matrix import coded, empty_matrix, product

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HIDDEN, INNER = 72, 40


def silu_mul(inner: torch.Tensor, out: torch.Tensor) -> None:
    reference.silu_mul(None, inner, out)


def layer(num_experts: int, kind: str, *, has_bias: bool = False, balances: bool = False):
    """Gate and up, and down, of each expert: (matrices, biases) of both."""
    both = []
    for rows, columns in ((2 * INNER, HIDDEN), (HIDDEN, INNER)):
        matrices = []
        for index in range(num_experts):
            matrix = empty_matrix(rows, columns, kind)
            if kind == "int4_affine":
                matrix.pack_codes(None, 0, *coded(kind, 32, rows, columns))
            else:
                torch.manual_seed(100 * index + rows)
                weight = 0.2 * torch.randn(rows, columns)
                if balances and index % 2:
                    weight[:, 7] *= 50
                    matrix.balance_columns(None, [weight])
                matrix.pack_rows(None, 0, weight)
            matrices.append(matrix)
        biases = [normal(rows, 1)[:, 0].contiguous().to(DEVICE) if has_bias else None for _ in matrices]
        both.append((matrices, biases))
    return both


def route(num_rows: int, num_experts: int, num_chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Most rows choose the first experts, some of the others are nobody's."""
    scores = normal(num_rows, num_experts) - 0.3 * torch.arange(num_experts)
    weights, ids = scores.softmax(-1).topk(num_chosen)
    return weights.to(DEVICE), ids.to(DEVICE)


def run(both, x, weights, ids, *, gate=silu_mul, **choices) -> torch.Tensor:
    grouped = [ExpertMatrices(*own) for own in both]
    out = torch.full(x.shape, float("nan"), dtype=x.dtype, device=DEVICE)
    experts(context(**choices), x.to(DEVICE), weights, ids, grouped[0], gate, grouped[1], out)
    return out.cpu()


def one_by_one(both, x, weights, ids, gate=silu_mul) -> torch.Tensor:
    """Each expert's products on its own rows; what lies between them is rounded as it is there."""
    expected = torch.zeros(x.shape)
    for expert in range(len(both[0][0])):
        rows, ranks = (ids.cpu() == expert).nonzero(as_tuple=True)
        (up, up_bias), (down, down_bias) = ((own[0][expert], own[1][expert]) for own in both)
        inner = product(up, x[rows], up_bias)
        middle = torch.empty(len(rows), INNER, dtype=x.dtype)
        gate(inner, middle)
        found = weights.cpu()[rows, ranks, None] * product(down, middle, down_bias).float()
        expected.index_add_(0, rows, found)
    return expected


@pytest.mark.parametrize(
    ("kind", "dtype", "options"),
    [
        ("bfloat16", BF16, {}),
        ("float32", FP32, {"has_bias": True}),
        ("int8", BF16, {"balances": True}),
        ("int4", FP16, {}),
        ("int4_affine", BF16, {"has_bias": True}),
        ("fp8", BF16, {}),
    ],
)
def test_every_format(kind, dtype, options):
    both = layer(5, kind, **options)
    x, (weights, ids) = normal(21, HIDDEN).to(dtype), route(21, 5, 2)
    # Weights of bfloat16 are multiplied by torch elsewhere, here all in one order.
    expected = one_by_one(both, x, weights, ids)
    found = run(both, x, weights, ids).float()
    unit = {BF16: 2.0**-8, FP16: 2.0**-11, FP32: 2.0**-22}[dtype]
    assert (found - expected).norm() <= 2 * unit * expected.norm()
    assert torch.isfinite(found).all()


@pytest.mark.parametrize(
    ("num_rows", "num_experts", "num_chosen"), [(1, 1, 1), (1, 16, 4), (90, 3, 3), (0, 4, 2)]
)
def test_any_number_of_rows_and_experts(num_rows, num_experts, num_chosen):
    both = layer(num_experts, "float32")
    x, (weights, ids) = normal(num_rows, HIDDEN), route(num_rows, num_experts, num_chosen)
    torch.testing.assert_close(run(both, x, weights, ids), one_by_one(both, x, weights, ids))


def test_all_rows_may_choose_one_expert_and_the_gate_may_be_another():
    def gate(inner: torch.Tensor, out: torch.Tensor) -> None:
        reference.clamped_swiglu(None, inner, 1.702, 7.0, out)

    both = layer(4, "float32", has_bias=True)
    x, weights = normal(40, HIDDEN), torch.ones(40, 1, device=DEVICE)
    ids = torch.full((40, 1), 2, device=DEVICE)
    torch.testing.assert_close(
        run(both, x, weights, ids, gate=gate), one_by_one(both, x, weights, ids, gate=gate)
    )


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_deterministic_rows_have_the_same_bits_in_any_batch(kind):
    both = layer(4, kind, has_bias=True)
    x, (weights, ids) = normal(150, HIDDEN).to(BF16), route(150, 4, 2)
    together = run(both, x, weights, ids, is_deterministic=True)
    for rows in (slice(0, 1), slice(63, 66), slice(100, 150)):
        alone = run(both, x[rows], weights[rows], ids[rows], is_deterministic=True)
        assert_same_bits(alone.float(), together[rows].float())


def test_what_one_kernel_cannot_read_together():
    alike = [empty_matrix(4, 64, "int4") for _ in range(3)]
    assert are_alike(alike)
    assert not are_alike([*alike, empty_matrix(4, 64, "int8")])
    assert not are_alike([*alike, empty_matrix(4, 64, "int4", 128)])
    alike[1].column_order = [*range(1, 64), 0]
    assert not are_alike(alike)
    with pytest.raises(NativeError, match="not all of its rows have been packed"):
        ExpertMatrices(alike, [None] * 3)


def test_matrices_live_as_long_as_their_addresses():
    matrix = PackedMatrix(4, 16, "float32")
    matrix.pack_rows(None, 0, torch.ones(4, 16))
    grouped = ExpertMatrices([matrix], [None])
    address = matrix.stored.data_ptr()
    del matrix
    assert grouped.table[0, 0] == address and grouped.first.stored.data_ptr() == address
