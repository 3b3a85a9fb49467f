"""rope against its reference, and bit by bit against the formula that transformers uses."""

from __future__ import annotations

import pytest
import torch

from engine.errors import NativeError
from engine.ops import reference
from engine.ops.rope import rope
from helpers.compare import assert_close, assert_same_bits, sum_bound
from helpers.native import ISAS, context

NUM_POSITIONS = 40


def tables(half: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(NUM_POSITIONS)[:, None] * 10.0 ** -torch.linspace(0, 4, half)[None, :]
    return angles.cos(), angles.sin()


def heads(num_tokens: int, num_heads: int, head_dim: int) -> torch.Tensor:
    """Heads as columns of a wider matrix, its rows misaligned."""
    wide = torch.randn(num_tokens, num_heads * head_dim + 9)
    return wide[:, 3 : 3 + num_heads * head_dim].unflatten(1, (num_heads, head_dim))


@pytest.mark.parametrize(
    ("head_dim", "half"), [(64, 32), (80, 40), (128, 32), (96, 7), (16, 8), (64, 0), (5, 2)]
)
@pytest.mark.parametrize("isa", ISAS)
def test_rope_is_the_reference(isa, head_dim, half):
    torch.manual_seed(head_dim + half)
    q, k = heads(11, 6, head_dim), heads(11, 2, head_dim)
    positions = torch.randint(NUM_POSITIONS, (11,), dtype=torch.int32)
    cos, sin = tables(half)
    before = torch.cat([q, k], 1)
    expected = before.double()
    reference.rope(None, *expected.split([6, 2], 1), cos, sin, positions)
    rope(context(isa), q, k, cos, sin, positions)
    actual = torch.cat([q, k], 1)
    assert_close(actual, expected, sum_bound(magnitude(before, cos, sin, positions), 2))
    assert_same_bits(actual[..., 2 * half :], before[..., 2 * half :])


def magnitude(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """|x cos| + |y sin| of each element."""
    half = cos.shape[1]
    c, s = (table[positions.long()].abs().double()[:, None, :] for table in (cos, sin))
    first, second = x[..., :half].abs().double(), x[..., half : 2 * half].abs().double()
    return torch.cat([first * c + second * s, second * c + first * s, x[..., 2 * half :].abs().double()], -1)


@pytest.mark.parametrize("isa", ISAS)
def test_bits_are_those_of_the_usual_float32_formula(isa):
    """x cos + rotate_half(x) sin, as transformers writes it: a fused product would differ."""
    torch.manual_seed(0)
    q, k = heads(30, 4, 64), heads(30, 2, 64)
    positions = torch.randperm(NUM_POSITIONS)[:30].int()
    cos, sin = (torch.cat([table, table], -1)[positions.long(), None] for table in tables(32))
    expected = [x * cos + torch.cat([-x[..., 32:], x[..., :32]], -1) * sin for x in (q, k)]
    rope(context(isa), q, k, *tables(32), positions)
    assert_same_bits(q, expected[0])
    assert_same_bits(k, expected[1])


def test_no_tokens():
    rope(
        context(ISAS[-1]),
        torch.empty(0, 4, 64),
        torch.empty(0, 2, 64),
        *tables(32),
        torch.empty(0, dtype=torch.int32),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"positions": torch.tensor([0, 40], dtype=torch.int32)},
            "positions: expected 0 to 39 .*, got 40 at index 1",
        ),
        (
            {"positions": torch.tensor([-1, 0], dtype=torch.int32)},
            "positions: expected 0 to 39 .*, got -1 at index 0",
        ),
        ({"positions": torch.tensor([0, 1])}, "positions: expected int32, got int64"),
        ({"positions": torch.zeros(3, dtype=torch.int32)}, r"positions: expected \[T=2\], got \[3\]"),
        ({"k": torch.zeros(2, 1, 32)}, r"k: expected \[T=2, G, D=64\], got \[2, 1, 32\]"),
        ({"sin": torch.zeros(40, 16)}, r"sin: expected \[P=40, R/2=32\], got \[40, 16\]"),
        ({"sin": torch.zeros(39, 32)}, r"sin: expected \[P=40, R/2=32\], got \[39, 32\]"),
        (
            {"cos": torch.zeros(40, 33), "sin": torch.zeros(40, 33)},
            "cos: expected at most D/2=32 columns, got 33",
        ),
        ({"cos": torch.zeros(0, 32), "sin": torch.zeros(0, 32)}, "positions: expected 0 to -1"),
    ],
)
def test_wrong_arguments_are_refused_and_change_nothing(change, message):
    cos, sin = tables(32)
    args = {"q": torch.ones(2, 4, 64), "k": torch.ones(2, 1, 64), "cos": cos, "sin": sin}
    args["positions"] = torch.zeros(2, dtype=torch.int32)
    args |= change
    with pytest.raises(NativeError, match=message):
        rope(context(ISAS[-1]), **args)
    assert (args["q"] == 1).all()
