"""Native calls with arguments that are almost right: each is computed or refused, and no more is touched.

What a canary does not see the sanitizers do: docs/reliability.md has the command, with which
`BOUNDARY_EXAMPLES` may be more.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from engine import _native
from engine.errors import NativeError
from helpers.native import ISAS, context
from helpers.native_calls import EXTREMES, FLOATS, OPS, Arguments, check, plain, spoiled

REFUSALS = (NativeError, TypeError, ValueError, OverflowError, MemoryError, BufferError)
NUM_EXAMPLES = int(os.environ.get("BOUNDARY_EXAMPLES", "25"))
FUZZ = settings(
    max_examples=NUM_EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
some_isa = st.sampled_from(ISAS)


@pytest.mark.parametrize("op", OPS)
@FUZZ
@given(data=st.data())
def test_an_op_computes_or_refuses(op: str, data: st.DataObject) -> None:
    ctx = context(data.draw(some_isa))
    args = getattr(Arguments(data.draw, ctx), op)()
    for name in data.draw(st.lists(st.sampled_from(list(args)), min_size=1, max_size=2)):
        args[name] = spoiled(data.draw, args[name])
    with contextlib.suppress(*REFUSALS):
        getattr(_native, op)(ctx, **plain(args))
    check(args)


@pytest.mark.parametrize("op", OPS)
@FUZZ
@given(data=st.data())
def test_what_is_right_is_computed(op: str, data: st.DataObject) -> None:
    """Else the test above could pass because everything is refused."""
    ctx = context(data.draw(some_isa))
    args = getattr(Arguments(data.draw, ctx), op)()
    getattr(_native, op)(ctx, **plain(args))
    check(args)


_SIZES = st.integers(-1, 300) | st.sampled_from(EXTREMES)
_FORMATS = st.sampled_from(
    ["float32", "bfloat16", "bf16_dot", "int8", "int4", "int4_affine", "float64", "", "\0"]
)


@settings(FUZZ, max_examples=4 * NUM_EXAMPLES)
@given(data=st.data())
def test_a_matrix_is_packed_or_refused(data: st.DataObject) -> None:
    """No call is prepared for the one before it; what is complete in the end can be used."""
    draw, ctx = data.draw, context(data.draw(some_isa))
    arguments = Arguments(draw, ctx)
    columns = draw(st.integers(1, 200))
    try:
        matrix = _native.PackedMatrix(
            draw(_SIZES), columns, draw(_FORMATS), draw(st.sampled_from((0, 32, 128, -1)))
        )
    except REFUSALS:
        return
    with tempfile.TemporaryFile() as file:
        file.truncate(draw(st.sampled_from((0, 1, 4096, 2**16, 2**22))))
        fd = draw(st.sampled_from((file.fileno(), file.fileno(), -1, 2**31 - 1)))
        offset = draw(st.sampled_from((0, 0, 1, 4096, -4096, -(2**63), 2**63 - 1, 2**62)))
        for _ in range(draw(st.integers(1, 5))):
            num_rows = draw(st.integers(0, 40))
            weight = arguments.rows(num_rows, columns, dtype=draw(st.sampled_from(("float32", "bfloat16"))))
            if draw(st.booleans()):
                weight = spoiled(draw, weight)
            codes = arguments.codes(matrix, num_rows)
            for name in draw(st.lists(st.sampled_from(list(codes)), max_size=2)):
                codes[name] = spoiled(draw, codes[name])
            order = draw(
                st.permutations(range(columns)) | st.lists(_SIZES, max_size=3) | st.just([0] * columns)
            )
            call = draw(
                st.sampled_from(
                    (
                        lambda weight=weight: matrix.pack_rows(
                            ctx, draw(_SIZES), *plain({"weight": weight}).values()
                        ),
                        lambda weight=weight: matrix.balance_columns(
                            ctx, [*plain({"weight": weight}).values()]
                        ),
                        lambda codes=codes: matrix.pack_codes(ctx, draw(_SIZES), **plain(codes)),
                        lambda order=order: setattr(matrix, "column_order", order),
                        lambda: setattr(
                            matrix,
                            "column_scales",
                            [draw(st.sampled_from(FLOATS))] * draw(st.sampled_from((0, 1, columns))),
                        ),
                        lambda: matrix.write_file(ctx, fd, min(offset, 2**20)),
                        lambda: matrix.read_file(ctx, fd, offset),
                        lambda: matrix.map_file(fd, offset),
                    )
                )
            )
            with contextlib.suppress(*REFUSALS):
                call()
        if matrix.is_complete and matrix.out_features <= 300:
            x, out = np.ones((3, columns), "float32"), np.empty((3, matrix.out_features), "float32")
            _native.linear(ctx, x, matrix, None, out)


_MODULES = st.lists(
    st.tuples(_SIZES, _SIZES, st.integers(-1, 40) | st.sampled_from(EXTREMES), st.sampled_from(FLOATS)),
    max_size=3,
)


@settings(FUZZ, max_examples=4 * NUM_EXAMPLES)
@given(data=st.data())
def test_an_adapter_adds_or_is_refused(data: st.DataObject) -> None:
    """Sites, modules and plans made up, in any order and with any overlap."""
    draw, ctx = data.draw, context(data.draw(some_isa))
    arguments = Arguments(draw, ctx)
    sites = draw(st.lists(st.tuples(_SIZES, st.booleans(), _MODULES), min_size=1, max_size=2))
    with contextlib.suppress(*REFUSALS):
        adapter = _native.LoraAdapter(draw(_FORMATS), sites)
        for site, (in_features, _, modules) in enumerate(sites):
            for module, (_, num_columns, rank, _) in enumerate(modules):
                if max(in_features, num_columns) > 300:
                    return
                a, b = arguments.rows(rank, in_features), arguments.rows(num_columns, rank)
                adapter.pack(site, module, a.tensor, b.tensor)
        rows = draw(st.lists(st.integers(0, 9), unique=True, max_size=10))
        rows += draw(st.lists(st.sampled_from((-1, 3, 10, 2**31 - 1, -(2**31))), max_size=1))
        ends = draw(st.sampled_from(([0, len(rows)], [0, 0], [0, 2**31 - 1], [-1, len(rows)], [0], [])))
        plan = _native.LoraPlan(
            [adapter] * draw(st.integers(0, 2)), np.array(ends, "int32"), np.array(rows, "int32")
        )
        x, out = arguments.rows(10, max(sites[0][0], 0)), arguments.rows(10, draw(st.integers(0, 310)))
        workspace, site = arguments.floats(draw(st.sampled_from((0, 5, 1000)))), draw(st.integers(-1, 2))
        try:
            _native.lora(ctx, x.tensor, site, plan, workspace.tensor, out.tensor)
        except NativeError:
            _native.lora_embedding(ctx, arguments.ids(10, 9).tensor, site, plan, workspace.tensor, out.tensor)
        finally:
            check({"x": x, "out": out, "workspace": workspace})


@FUZZ
@given(
    num_threads=st.sampled_from([x for x in EXTREMES if not 0 < x < 2**31]) | st.integers(1, 3),
    isa=st.text(max_size=9) | some_isa,
)
def test_a_context_is_made_or_refused(num_threads: int, isa: str) -> None:
    with contextlib.suppress(*REFUSALS):
        assert _native.ExecutionContext(num_threads, isa).num_threads == num_threads


@pytest.mark.parametrize("num_bytes", [0, 15, 16, 4096])
def test_a_board_needs_its_bytes(num_bytes: int) -> None:
    """To touch what a file does not have would kill the process."""
    with tempfile.TemporaryFile() as file:
        file.truncate(num_bytes)
        if num_bytes >= 16:
            assert _native.ProgressBoard(file.fileno()).num_ops == 0
            return
        with pytest.raises(NativeError):
            _native.ProgressBoard(file.fileno())
    with pytest.raises(NativeError):
        _native.ProgressBoard(-1)


_IDS = st.lists(
    st.integers(-3, 40) | st.sampled_from([x for x in EXTREMES if abs(x) <= 2**31 - 1]), max_size=40
)


@settings(FUZZ, max_examples=4 * NUM_EXAMPLES)
@given(
    num_blocks=st.integers(1, 32),
    block_size=st.sampled_from([1, 4, 16]),
    hash_mask=st.sampled_from([2**32 - 1, 3, 0]),
    calls=st.lists(
        st.tuples(st.integers(0, 11), _IDS, _IDS, st.integers(-5, 40) | st.sampled_from(EXTREMES)),
        max_size=40,
    ),
)
def test_tree_and_allocator_refuse_nonsense_and_stay_whole(
    num_blocks: int, block_size: int, hash_mask: int, calls: list[tuple[int, list[int], list[int], int]]
) -> None:
    """No call is prepared for the one before it: nodes, blocks and counts are mostly nonsense."""
    allocator = _native.BlockAllocator(num_blocks)
    tree = _native.RadixTree(allocator, block_size, hash_mask)
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
        lambda: tree.path_len(number),
        lambda: tree.clear(),
    )
    actions[what]()


@pytest.mark.parametrize(
    "make", [lambda n: _native.BlockAllocator(n), lambda n: _native.RadixTree(_native.BlockAllocator(4), n)]
)
@pytest.mark.parametrize("number", [-(2**63), -1, 2**31, 2**62, 2**63])
def test_a_tree_or_allocator_of_an_impossible_size_is_refused(
    make: Callable[[int], Any], number: int
) -> None:
    with contextlib.suppress(*REFUSALS):
        made = make(number)
        assert number > 0
        made.check()
