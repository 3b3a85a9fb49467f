"""Native calls with arguments that are almost right: each is computed or refused, and no more is touched.

Every output lies between canaries, so that a write outside is seen here too. What else is wrong the
sanitizers see: docs/reliability.md has the command, with which `BOUNDARY_EXAMPLES` may be more. No torch:
numpy arrays cross the boundary in the same way.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from engine import _native
from engine.errors import NativeError

REFUSALS = (NativeError, TypeError, ValueError, OverflowError, MemoryError)
CANARY = 64
DTYPES = ("float32", "float16", "float64", "int32", "int64", "int8", "uint8")
EXTREMES = (-(2**31), -1, 0, 1, 2**31 - 1)
Args = dict[str, Any]
FUZZ = settings(
    max_examples=int(os.environ.get("BOUNDARY_EXAMPLES", "100")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


class Guarded:
    """An array in the middle of a larger one, whose ends must stay as they are."""

    def __init__(self, shape: tuple[int, ...], dtype: str, fill: Callable[[int], np.ndarray] | None = None):
        size = int(np.prod(shape))
        self._memory = np.full(size + 2 * CANARY, 85, dtype)
        self.array = self._memory[CANARY : CANARY + size].reshape(shape)
        if fill is not None:
            self.array[...] = fill(size).reshape(shape)

    def check(self) -> None:
        ends = np.concatenate([self._memory[:CANARY], self._memory[-CANARY:]])
        assert (ends == 85).all(), "a write outside of the array"


def floats(*shape: int) -> Guarded:
    return Guarded(shape, "float32", lambda size: np.linspace(-2, 2, size, dtype="float32"))


def ints(values: Any, dtype: str = "int32") -> Guarded:
    values = np.asarray(values)
    return Guarded(values.shape, dtype, lambda size: values.ravel())


@pytest.fixture(scope="module")
def ctx() -> _native.ExecutionContext:
    return _native.ExecutionContext(2)


def a_matrix(out_features: int, in_features: int, ctx: _native.ExecutionContext) -> _native.PackedMatrix:
    matrix = _native.PackedMatrix(out_features, in_features, "float32")
    matrix.pack_rows(ctx, 0, np.ones((out_features, in_features), "float32"))
    return matrix


def valid_calls(draw: Any, ctx: _native.ExecutionContext) -> dict[Callable[..., Any], Args]:
    """Arguments with which each op computes, in the order of its parameters."""

    def size(most: int = 6) -> int:
        return draw(st.integers(1, most))

    T, H, G, n, V, N = size(), size(3), 1, size(40), size(70), size(4)
    D, S = 64, 16
    ids = draw(st.lists(st.integers(0, V - 1), min_size=T, max_size=T))
    slots = draw(st.permutations(range(N * S)))[:T]
    lens = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    kv_lens = [length + draw(st.integers(0, N * S - length)) for length in lens]
    return {
        _native.rms_norm: {"x": floats(T, n), "weight": floats(n), "eps": 1e-5, "out": floats(T, n)},
        _native.add_rms_norm: {
            "x": floats(T, n),
            "residual": floats(T, n),
            "weight": floats(n),
            "eps": 1e-5,
            "out": floats(T, n),
        },
        _native.silu_mul: {"gate_up": floats(T, 2 * n), "out": floats(T, n)},
        _native.gelu_mul: {"gate_up": floats(T, 2 * n), "out": floats(T, n)},
        _native.rope: {
            "q": floats(T, H, D),
            "k": floats(T, G, D),
            "cos": floats(50, D // 2),
            "sin": floats(50, D // 2),
            "positions": ints(draw(st.lists(st.integers(0, 49), min_size=T, max_size=T))),
        },
        _native.append_kv: {
            "k": floats(T, G, D),
            "v": floats(T, G, D),
            "k_cache": floats(N, G, D, S),
            "v_cache": floats(N, G, S, D),
            "slot_ids": ints(slots, "int64"),
        },
        _native.paged_attention: {
            "q": floats(sum(lens), H, D),
            "k_cache": floats(N, G, D, S),
            "v_cache": floats(N, G, S, D),
            "cu_seqlens_q": ints(np.cumsum([0, *lens])),
            "kv_lens": ints(kv_lens),
            "block_tables": ints([draw(st.permutations(range(N))) for _ in lens]),
            "scale": 0.125,
            "window": draw(st.integers(0, 20)),
            "softcap": 0.0,
            "is_causal": True,
            "out": floats(sum(lens), H, D),
        },
        _native.linear: {
            "x": floats(T, n),
            "weight": a_matrix(V, n, ctx),
            "bias": draw(st.sampled_from([None, floats(V)])),
            "out": floats(T, V),
        },
        _native.embedding: {"token_ids": ints(ids), "weight": a_matrix(V, n, ctx), "out": floats(T, n)},
        _native.score_tokens: {
            "logits": floats(T, V),
            "token_ids": ints(ids),
            "num_top_logprobs": ints([min(2, V)] * T),
            "out_logprobs": floats(T),
            "top_ids": ints(np.zeros((T, min(2, V)), int)),
            "top_logprobs": floats(T, min(2, V)),
            "reports_logits": False,
        },
    }


def spoiled(draw: Any, value: Any) -> Any:
    """Something like `value` that is perhaps wrong."""
    if not isinstance(value, Guarded):
        if isinstance(value, (int, float)):
            return draw(st.sampled_from([*EXTREMES, 0.5, float("nan"), float("inf")]))
        return draw(st.sampled_from([None, value, 3]))
    array = value.array
    how = draw(st.integers(0, 6))
    if how == 0:
        return Guarded(array.shape, draw(st.sampled_from(DTYPES)))
    if how == 1:
        shape = draw(st.lists(st.integers(0, 70), max_size=5))
        return Guarded(tuple(shape), str(array.dtype))
    if how == 2 and array.ndim:
        axis = draw(st.integers(0, array.ndim - 1))
        shape = list(array.shape)
        shape[axis] = max(0, shape[axis] + draw(st.sampled_from([-1, 1, 3])))
        return Guarded(tuple(shape), str(array.dtype))
    if how == 3 and array.size:  # a value out of its range
        at = draw(st.integers(0, array.size - 1))
        extremes = EXTREMES if array.dtype.kind == "i" else (np.nan, np.inf, -np.inf, 1e38)
        array.reshape(-1)[at] = draw(st.sampled_from(extremes))
    elif how == 4 and array.ndim:
        return _Strided(value, array[tuple([slice(None)] * (array.ndim - 1) + [slice(None, None, -1)])])
    elif how == 5 and array.ndim >= 2:
        return _Strided(value, np.swapaxes(array, 0, 1))
    return value


class _Strided:
    """A view of a guarded array with odd strides."""

    def __init__(self, base: Guarded, array: np.ndarray) -> None:
        self._base, self.array = base, array

    def check(self) -> None:
        self._base.check()


@FUZZ
@given(data=st.data())
def test_an_op_computes_or_refuses(ctx: _native.ExecutionContext, data: st.DataObject) -> None:
    calls = valid_calls(data.draw, ctx)
    op = data.draw(st.sampled_from(list(calls)))
    args = calls[op]
    for name in data.draw(st.lists(st.sampled_from(list(args)), max_size=2)):
        args[name] = spoiled(data.draw, args[name])
    plain = {name: value.array if hasattr(value, "array") else value for name, value in args.items()}
    try:
        op(ctx, *plain.values())
    except REFUSALS:
        assert args, "a refusal is as good as an answer"
    for value in args.values():
        if hasattr(value, "check"):
            value.check()


@FUZZ
@given(data=st.data())
def test_what_is_right_is_computed(ctx: _native.ExecutionContext, data: st.DataObject) -> None:
    """Else the test above could pass because everything is refused."""
    for op, args in valid_calls(data.draw, ctx).items():
        op(ctx, *[value.array if isinstance(value, Guarded) else value for value in args.values()])
        for value in args.values():
            if isinstance(value, Guarded):
                value.check()


_IDS = st.lists(st.integers(-3, 40) | st.sampled_from(EXTREMES), max_size=40)


@FUZZ
@given(
    num_blocks=st.integers(1, 32),
    block_size=st.sampled_from([1, 4, 16]),
    calls=st.lists(st.tuples(st.integers(0, 9), _IDS, _IDS, st.integers(-5, 40)), max_size=40),
)
def test_tree_and_allocator_refuse_nonsense_and_stay_whole(
    num_blocks: int, block_size: int, calls: list[tuple[int, list[int], list[int], int]]
) -> None:
    """No call is prepared for the one before it: nodes, blocks and counts are mostly nonsense."""
    allocator = _native.BlockAllocator(num_blocks)
    tree = _native.RadixTree(allocator, block_size)
    for what, first, second, number in calls:
        try:
            _act(tree, allocator, what, np.array(first, np.int32), np.array(second, np.int32), number)
        except REFUSALS:
            continue
        finally:
            allocator.check()
            tree.check()


def _act(
    tree: _native.RadixTree,
    allocator: _native.BlockAllocator,
    what: int,
    tokens: np.ndarray,
    blocks: np.ndarray,
    number: int,
) -> None:
    actions: tuple[Callable[[], Any], ...] = (
        lambda: allocator.try_allocate(number),
        lambda: allocator.retain(blocks),
        lambda: allocator.release(blocks),
        lambda: allocator.ref_count(number),
        lambda: tree.match("a", tokens),
        lambda: tree.insert("a", tokens, blocks, number),
        lambda: tree.lock(number),
        lambda: tree.unlock(number),
        lambda: tree.evict(number),
        lambda: tree.match_length("\x00é", tokens),
    )
    actions[what]()
