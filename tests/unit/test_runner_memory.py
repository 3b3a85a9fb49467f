"""Memory foretold against memory taken."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from engine.models.registry import spec_from_config
from engine.models.spec import StoredFormat
from engine.models.workspace import Workspace
from engine.ops.linear import PackedMatrix
from engine.runner.kv_cache import KVCache
from engine.runner.memory import block_bytes, blocks_that_fit, text_bytes, weight_bytes
from helpers.tiny_models import LLAMA_CONFIG

SPEC = spec_from_config(LLAMA_CONFIG)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
@pytest.mark.parametrize("block_size", [1, 16, 32])
def test_block_bytes_are_those_of_the_cache(dtype, block_size):
    cache = KVCache(SPEC, num_blocks=7, block_size=block_size, dtype=getattr(torch, dtype))
    taken = sum(tensor.nbytes for layer in cache.layers for tensor in layer if tensor is not None)
    assert taken == 7 * block_bytes(SPEC, block_size, dtype)


def test_blocks_that_fit():
    one = block_bytes(SPEC, 16, "bfloat16")
    assert [blocks_that_fit(SPEC, 16, "bfloat16", size) for size in (-1, 0, one - 1, one, 5 * one + 1)] == [
        0, 0, 0, 1, 5,
    ]  # fmt: skip


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("max_tokens", "max_len", "num_blocks"), [(64, 2000, 125), (256, 2000, 256)])
def test_text_bytes_are_those_of_the_cache_and_the_workspace(is_causal, max_tokens, max_len, num_blocks):
    spec = dataclasses.replace(SPEC, is_causal=is_causal)
    cache = KVCache(spec, num_blocks=num_blocks, block_size=16, dtype=torch.bfloat16)
    workspace = Workspace(spec, max_tokens if is_causal else max_len, 0)
    tensors = [tensor for layer in cache.layers for tensor in layer if tensor is not None]
    tensors += [value for value in vars(workspace).values() if isinstance(value, torch.Tensor)]
    assert text_bytes(spec, "bfloat16", max_tokens, max_len) == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize(("head_dim", "ratio"), [(64, 1.88), (128, 1.93)])
def test_int8_gives_nearly_twice_the_blocks(head_dim, ratio):
    spec = dataclasses.replace(SPEC, head_dim=head_dim)
    blocks = {dtype: blocks_that_fit(spec, 16, dtype, 2**30) for dtype in ("bfloat16", "int8")}
    assert blocks["int8"] / blocks["bfloat16"] == pytest.approx(ratio, abs=0.01)


def test_weight_bytes():
    hidden, mlp, vocabulary = 256, 512, 1000
    layer = hidden * hidden * 2 + hidden * 128 * 2 + 3 * hidden * mlp
    assert weight_bytes(SPEC, "bfloat16") == 2 * (2 * layer + 2 * vocabulary * hidden)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8", "int4"])
def test_weight_bytes_are_those_of_packed_matrices(dtype):
    matrix = PackedMatrix(320, 512, dtype)
    spec = dataclasses.replace(SPEC, num_layers=0, vocab_size=320, hidden_size=512, tie_word_embeddings=True)
    assert weight_bytes(spec, dtype) == matrix.num_bytes


def test_matrices_in_few_bits_count_as_they_are():
    formats = {"int8": StoredFormat("int8", 32), "int4": StoredFormat("int4", 128)}
    formats["int4_affine"] = StoredFormat("int4_affine", 32)
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    rows = (256, 128, 128, 256, 512, 512, 512)
    for stored in formats.values():
        matrices = [PackedMatrix(count, 256, stored.dtype, stored.group_len) for count in rows]
        spec = dataclasses.replace(SPEC, stored={f"model.layers.0.x.{name}": stored for name in names})
        plain = 2 * 256 * sum(rows)
        expected = weight_bytes(SPEC, "bfloat16") - plain + sum(matrix.num_bytes for matrix in matrices)
        assert weight_bytes(spec, "bfloat16") == expected
