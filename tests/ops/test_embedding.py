"""ops.embedding against plain PyTorch on every instruction set."""

from __future__ import annotations

import pytest
import torch

from engine.errors import NativeError
from engine.ops import reference
from engine.ops.embedding import embedding
from engine.ops.linear import PackedMatrix
from helpers.compare import GuardedOutput, assert_same_bits
from helpers.native import ISAS, context


def packed_pair(vocab: int, num_k: int, dtype: str) -> tuple[PackedMatrix, reference.PackedMatrix]:
    weight = torch.randn(vocab, num_k, generator=torch.Generator().manual_seed(1))
    pair = PackedMatrix(vocab, num_k, dtype), reference.PackedMatrix(vocab, num_k, dtype)
    for matrix in pair:
        matrix.pack_rows(context(ISAS[-1]), 0, weight)
    return pair


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("vocab", [1, 16, 31, 32, 33, 100])
@pytest.mark.parametrize("num_k", [1, 7, 64, 200])
def test_equals_reference(isa, dtype, vocab, num_k):
    matrix, expected_matrix = packed_pair(vocab, num_k, dtype)
    generator = torch.Generator().manual_seed(2)
    for num_tokens in (0, 1, 2, 31, 100):
        ids = torch.randint(vocab, (num_tokens,), generator=generator, dtype=torch.int32)
        expected = torch.empty(num_tokens, num_k)
        reference.embedding(None, ids, expected_matrix, expected)
        out = GuardedOutput(num_tokens, num_k)
        embedding(context(isa, 3), ids, matrix, out.tensor)
        assert_same_bits(out.tensor, expected)
        out.assert_untouched_outside()


@pytest.mark.parametrize("wrong_id", [-1, 33, 63, 64, 2**31 - 1, -(2**31)])
def test_refuses_ids_outside_the_vocabulary_and_writes_nothing(wrong_id):
    matrix, _ = packed_pair(33, 8, "bfloat16")
    ids, out = torch.tensor([0, 32, wrong_id], dtype=torch.int32), torch.full((3, 8), 7.0)
    with pytest.raises(NativeError, match=rf"token_ids: .*V=33, got {wrong_id} at index 2"):
        embedding(context(ISAS[-1]), ids, matrix, out)
    assert (out == 7.0).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"token_ids": torch.zeros(3, dtype=torch.int64)}, "token_ids: expected int32, got int64"),
        ({"token_ids": torch.zeros(3, 1, dtype=torch.int32)}, r"token_ids: expected \[T\], got \[3, 1\]"),
        ({"token_ids": torch.zeros(6, dtype=torch.int32)[::2]}, "token_ids: expected a contiguous tensor"),
        ({"out": torch.zeros(2, 8)}, r"out: expected \[T=3, K=8\], got \[2, 8\]"),
        ({"out": torch.zeros(3, 9)}, r"out: expected \[T=3, K=8\], got \[3, 9\]"),
        ({"out": torch.zeros(3, 8).half()}, "out: expected float32, got float16"),
        ({"weight": PackedMatrix(4, 8, "float32")}, "weight: not all of its rows"),
    ],
)
def test_refuses_wrong_arguments(changed, message):
    matrix, _ = packed_pair(33, 8, "bfloat16")
    arguments = {"token_ids": torch.zeros(3, dtype=torch.int32), "weight": matrix, "out": torch.zeros(3, 8)}
    with pytest.raises(NativeError, match=message):
        embedding(context(ISAS[-1]), **(arguments | changed))
