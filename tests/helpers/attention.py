"""Paged caches with known contents, for tests of attention and of what is built on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from engine.ops import reference
from engine.ops.attention_plan import AttentionPlan, LayerCache
from engine.ops.paged_attention import paged_attention
from helpers.compare import EPSILON, GuardedOutput, assert_close
from helpers.native import context

UNREAD_BLOCK = 2**31 - 1  # a block id that must never be looked up
# (query rows, cached tokens): whole prompts, decodes, and chunks after a cached prefix.
MIX = [(1, 1), (15, 15), (1, 16), (17, 17), (3, 255), (1, 256), (2, 257), (9, 600), (0, 40)]
BF16, FP32, INT8 = torch.bfloat16, torch.float32, torch.int8


@dataclasses.dataclass
class AttentionCase:
    """Sequences in a shuffled cache. Slots that hold no token are NaN, table entries past the last
    block are `UNREAD_BLOCK`."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    plan: AttentionPlan
    kv_scales: torch.Tensor | None = None

    def quantized(self) -> AttentionCase:
        """The same with a cache of int8; scales are NaN where no token is."""
        k_codes, k_scales = reference.quantize_heads(self.k_cache.float().transpose(2, 3))
        v_codes, v_scales = reference.quantize_heads(self.v_cache.float())
        return dataclasses.replace(
            self,
            k_cache=k_codes.transpose(2, 3).contiguous(),
            v_cache=v_codes,
            kv_scales=torch.stack([k_scales, v_scales], 2),
        )

    @property
    def block_size(self) -> int:
        return self.v_cache.shape[2]

    def rows(self, sequence: int, first: int, last: int) -> AttentionCase:
        """Query rows [first, last) of one sequence, as a step of their own that ends with them."""
        begin, end = self.plan.cu_seqlens_q[sequence : sequence + 2].tolist()
        kv_len = int(self.plan.kv_lens[sequence]) - (end - begin) + last
        plan = make_plan([last - first], [kv_len], self.plan.block_tables[sequence : sequence + 1])
        return dataclasses.replace(self, q=self.q[begin + first : begin + last], plan=plan)


def make_plan(num_rows: Sequence[int], kv_lens: Sequence[int], block_tables: torch.Tensor) -> AttentionPlan:
    ends = torch.tensor([0, *num_rows]).cumsum(0)
    return AttentionPlan(ends.int(), torch.tensor(kv_lens, dtype=torch.int32), block_tables)


def make_case(
    sequences: Sequence[tuple[int, int]],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> AttentionCase:
    """`sequences` are (query rows, tokens in the cache). Queries, keys and values depend on the seed
    and the sequences, not on the block size; where the blocks lie depends on it. An int8 cache is the
    float32 one quantized."""
    if dtype == torch.int8:
        sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "block_size": block_size}
        return make_case(sequences, **sizes, dtype=torch.float32, seed=seed).quantized()
    random = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(sum(rows for rows, _ in sequences), heads, head_dim, generator=random)
    contents = [torch.randn(2, kv_len, kv_heads, head_dim, generator=random) for _, kv_len in sequences]
    num_blocks = [-(-kv_len // block_size) for _, kv_len in sequences]
    order = torch.randperm(sum(num_blocks) + 2, generator=random).int()
    tables = torch.full((len(sequences), max(num_blocks, default=0) + 1), UNREAD_BLOCK, dtype=torch.int32)
    nan = float("nan")
    k_cache = torch.full((len(order), kv_heads, head_dim, block_size), nan, dtype=dtype)
    v_cache = torch.full((len(order), kv_heads, block_size, head_dim), nan, dtype=dtype)
    for row, (count, (keys, values)) in enumerate(zip(num_blocks, contents, strict=True)):
        tables[row, :count], order = order[:count], order[count:]
        slots = torch.arange(len(keys))
        blocks, offsets = tables[row][slots // block_size].long(), slots % block_size
        k_cache[blocks, :, :, offsets] = keys.to(dtype)
        v_cache[blocks, :, offsets, :] = values.to(dtype)
    plan = make_plan([rows for rows, _ in sequences], [kv_len for _, kv_len in sequences], tables)
    return AttentionCase(q, k_cache, v_cache, plan)


def poison(cache: LayerCache) -> None:
    """What answers show if it is read: NaN, or codes with a scale that is NaN."""
    for tensor in cache:
        if tensor is not None:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 77)


def both_ways(case: AttentionCase) -> AttentionCase:
    return dataclasses.replace(case, plan=dataclasses.replace(case.plan, is_causal=False))


def attend(
    case: AttentionCase,
    isa: str,
    num_threads: int = 2,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    rounds: bool = False,
) -> torch.Tensor:
    out = torch.full(case.q.shape, float("nan"))
    scale = case.q.shape[2] ** -0.5
    caches, numbers = (case.k_cache, case.v_cache), (scale, window, softcap)
    ctx = context(isa, num_threads, rounds)
    paged_attention(ctx, case.q, *caches, case.plan, *numbers, out, sinks, case.kv_scales)
    return out


def bound(case: AttentionCase, out_magnitude: torch.Tensor, softcap: float) -> torch.Tensor:
    """Error of the weights times sum(weight |value|), plus that of summing.

    A score of D products has an absolute error of at most 2 (D + 2) roundings of |q| |k| scale, the
    product unfused, and one more with a key's scale; a value's scale costs a weight one. A cap adds six
    roundings of its size. The exponent's subtractions, within a split and between splits, are of numbers
    no larger than that. A weight is off by the errors of its own score and, through the normalisation, by
    those of the others.
    """
    keys = case.k_cache.double()
    if case.kv_scales is not None:
        keys = keys * case.kv_scales[:, :, 0, None, :].double()
    keys = torch.nan_to_num(keys).norm(dim=2).amax()  # |q| |k| by Cauchy and Schwarz
    magnitude = case.q.double().norm(dim=2).amax() * keys * case.q.shape[2] ** -0.5
    score = (2 * (case.q.shape[2] + 2) + 1) * magnitude + 6 * softcap + 4 * 2 * magnitude
    num_splits = case.plan.kv_lens.max() / 256 + 1
    summing = 2 * (2 * 256 + 16 + 6 * num_splits) + 1
    return out_magnitude * (2 * score + summing) * EPSILON * 1.01 + 1e-30


def check(
    case: AttentionCase,
    isa: str,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> None:
    num_rows, heads, head_dim = case.q.shape
    scale = head_dim**-0.5
    out = GuardedOutput(num_rows, heads * head_dim)
    rows = out.tensor.unflatten(1, (heads, head_dim))
    caches = case.k_cache, case.v_cache
    paged_attention(
        context(isa), case.q, *caches, case.plan, scale, window, softcap, rows, sinks, case.kv_scales
    )
    expected, magnitude = torch.empty(2, num_rows, heads, head_dim, dtype=torch.float64)
    arguments = (case.plan, scale, window, softcap)
    reference.paged_attention(
        None, case.q, case.k_cache, case.v_cache, *arguments, expected, sinks, case.kv_scales
    )
    reference.paged_attention(
        None, case.q, case.k_cache, case.v_cache.abs(), *arguments, magnitude, sinks, case.kv_scales
    )
    assert_close(rows, expected, bound(case, magnitude, softcap))
    out.assert_untouched_outside()
