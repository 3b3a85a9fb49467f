"""Arguments of every native op: such that it computes, and the same but for one thing that is wrong.

Arrays lie between canaries, so that a write outside is seen without a sanitizer too.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch

import engine
from engine import _native

CANARY = 64
DTYPES = ("float32", "float16", "bfloat16", "float64", "int32", "int64", "int8", "uint8", "bool")
EXTREMES = (-(2**63), -(2**31), -1, 0, 1, 2**31 - 1, 2**62)
FLOATS = (0.0, -0.0, 1e-45, 1.0, -3.0, 1e38, -1e38, float("inf"), float("-inf"), float("nan"))
Args = dict[str, Any]
Draw = Callable[[st.SearchStrategy], Any]


class Guarded:
    """An array in the middle of a larger one, whose ends must stay as they are."""

    def __init__(self, values: Any, dtype: str) -> None:
        values = np.asarray(values)
        stored = "uint16" if dtype == "bfloat16" else dtype
        if dtype == "bfloat16":  # the upper half of the float
            values = (np.asarray(values, "float32").view("uint32") >> 16).astype("uint16")
        self.dtype = dtype
        self._memory = np.full(values.size + 2 * CANARY, 85, stored)
        self.numpy = self._memory[CANARY : CANARY + values.size].reshape(values.shape)
        with np.errstate(all="ignore"):
            self.numpy[...] = values

    @property
    def tensor(self) -> Any:
        """What crosses the boundary: numpy's array, or torch's where numpy has no such type."""
        if self.dtype == "bfloat16":
            return torch.from_numpy(self.numpy.view("int16")).view(torch.bfloat16)
        return self.numpy

    def check(self) -> None:
        ends = np.concatenate([self._memory[:CANARY], self._memory[-CANARY:]])
        assert (ends == self._memory.dtype.type(85)).all(), "a write outside of the array"


class View:
    """A part of a guarded array, or the same array with other strides."""

    def __init__(self, base: Guarded, view: np.ndarray) -> None:
        self._base, self.tensor = base, view

    def check(self) -> None:
        self._base.check()


def _cache_shapes(N: int, G: int, D: int, S: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return ("k_cache", (N, G, D, S)), ("v_cache", (N, G, S, D))


class Arguments:
    """Draws sizes and values, and makes the arguments of the ops of them."""

    def __init__(self, draw: Draw, ctx: _native.ExecutionContext) -> None:
        self._draw, self._ctx = draw, ctx
        self._special = draw(st.sampled_from((None, None, None, *FLOATS)))

    def size(self, most: int, least: int = 1) -> int:
        return self._draw(st.integers(least, most))

    def one_of(self, *choices: Any) -> Any:
        return self._draw(st.sampled_from(choices))

    def rows(self, *shape: int, dtype: str = "float32") -> Guarded | View:
        """Floats as of `floats`; perhaps with gaps between the rows."""
        gap = self.one_of(0, 0, 3) if len(shape) == 2 else 0
        return self._floats(shape, gap, dtype)

    def floats(self, *shape: int, dtype: str = "float32") -> Guarded:
        """Ordinary numbers, and one that is special here and there."""
        array = self._floats(shape, 0, dtype)
        assert isinstance(array, Guarded)
        return array

    def _floats(self, shape: tuple[int, ...], gap: int, dtype: str) -> Guarded | View:
        values = np.linspace(-2, 2, int(np.prod(shape)) + gap * shape[0], dtype="float32")
        if self._special is not None:
            values[:: self.size(5)] = self._special
        if not gap:
            return Guarded(values.reshape(shape), dtype)
        base = Guarded(values.reshape(shape[0], shape[1] + gap), dtype)
        return View(base, base.tensor[:, 1 : 1 + shape[1]])

    def ints(self, values: Any, dtype: str = "int32") -> Guarded:
        return Guarded(np.asarray(values, "int64"), dtype)

    def ids(self, count: int, most: int, dtype: str = "int32") -> Guarded:
        return self.ints(
            self._draw(st.lists(st.integers(0, most - 1), min_size=count, max_size=count)), dtype
        )

    def ends(self, lens: list[int], dtype: str = "int32") -> Guarded:
        return self.ints(np.cumsum([0, *lens]), dtype)

    def lens(self, most_rows: int, most: int, least: int = 0) -> list[int]:
        return self._draw(st.lists(st.integers(least, most), max_size=most_rows))

    def matrix(self, out_features: int, in_features: int) -> _native.PackedMatrix:
        dtype = self.one_of("float32", "bfloat16", "bf16_dot", "int8", "int4", "int4_affine")
        matrix = _native.PackedMatrix(out_features, in_features, dtype, self.one_of(0, 32, 128))
        if dtype == "int4_affine" or dtype.startswith("int") and self.one_of(True, False):
            matrix.pack_codes(self._ctx, 0, **plain(self.codes(matrix, out_features)))
            if self.one_of(True, False):
                matrix.column_order = list(self._draw(st.permutations(range(in_features))))
            return matrix
        weight = self.rows(out_features, in_features, dtype=self.one_of("float32", "bfloat16", "float16"))
        if dtype.startswith("int") and self.one_of(True, False):
            matrix.balance_columns(self._ctx, [weight.tensor])
        matrix.pack_rows(self._ctx, 0, weight.tensor)
        return matrix

    def codes(self, matrix: _native.PackedMatrix, num_rows: int) -> Args:
        """What `pack_codes` takes for a quantised matrix: any bytes, and a scale for each group of them."""
        groups = num_rows, -(-matrix.in_features // (matrix.group_len or 32))
        codes = np.arange(num_rows * matrix.in_features) * self.size(255, 0) % 256
        return {
            "codes": self.ints(codes.reshape(num_rows, matrix.in_features), "uint8"),
            "scales": self.rows(*groups, dtype="float16" if matrix.dtype == "int4" else "float32"),
            "offsets": self.rows(*groups) if matrix.dtype == "int4_affine" else None,
        }

    def caches(self, N: int, G: int, D: int, S: int) -> Args:
        dtype = self.one_of("float32", "bfloat16", "int8")
        if dtype != "int8":
            kinds = {name: self.floats(*shape, dtype=dtype) for name, shape in _cache_shapes(N, G, D, S)}
            return {**kinds, "kv_scales": None}
        codes = np.arange(N * G * D * S) * self.size(255, 0) % 256 - 128
        kinds = {name: self.ints(codes.reshape(shape), "int8") for name, shape in _cache_shapes(N, G, D, S)}
        return {**kinds, "kv_scales": self.floats(N, G, 2, S)}

    def plan(self, num_rows: int, in_features: int, num_columns: int, *, is_embedding: bool) -> Args:
        """What lora ops share: a plan over some of the rows, its site, and memory for it."""
        sites = [(7, is_embedding, []), (in_features, is_embedding, self._modules(num_columns))]
        rows = self._draw(st.permutations(range(num_rows)))[: self.size(num_rows, 0)]
        at = self.size(len(rows), 0)
        adapters = [self._adapter(sites) for _ in range(2)]
        plan = _native.LoraPlan(
            adapters, self.ends([at, len(rows) - at]).tensor, self.ints(rows, "int32").tensor
        )
        most_rank = sum(rank for _, _, rank, _ in sites[1][2])
        return {"site": self.one_of(0, 1), "plan": plan, "workspace": self.floats(len(rows) * most_rank)}

    def _modules(self, num_columns: int) -> list[tuple[int, int, int, float]]:
        cuts = sorted({0, *self._draw(st.lists(st.integers(0, num_columns), max_size=3)), num_columns})
        return [(a, b - a, self.size(9), 0.5) for a, b in zip(cuts, cuts[1:], strict=False)]

    def _adapter(self, sites: list[Any]) -> _native.LoraAdapter:
        adapter = _native.LoraAdapter(self.one_of("float32", "bfloat16"), sites)
        for site, (in_features, _, modules) in enumerate(sites):
            for module, (_, columns, rank, _) in enumerate(modules):
                a, b = self.rows(rank, in_features), self.rows(columns, rank)
                adapter.pack(site, module, a.tensor, b.tensor)
        return adapter

    # --- one method an op

    def rms_norm(self) -> Args:
        shape = (self.size(20, 0), self.size(90))
        shape = self.one_of(shape, (shape[0], 3, shape[1]))
        arrays = {"x": self.rows(*shape), "weight": self.floats(shape[-1])}
        return arrays | {"eps": 1e-5, "out": self.rows(*shape)}

    def add_rms_norm(self) -> Args:
        T, n = self.size(20, 0), self.size(90)
        arrays = {"x": self.rows(T, n), "residual": self.rows(T, n), "weight": self.floats(n)}
        return arrays | {"eps": 1e-5, "out": self.rows(T, n)}

    def layer_norm(self) -> Args:
        T, n = self.size(20, 0), self.size(90)
        return {
            "x": self.rows(T, n),
            "residual": self.one_of(None, self.rows(T, n)),
            "weight": self.floats(n),
            "bias": self.one_of(None, self.floats(n)),
            "eps": 1e-5,
            "out": self.rows(T, n),
        }

    def pool(self) -> Args:
        lens, n = self.lens(5, 6), self.size(90)
        return {
            "x": self.rows(sum(lens), n),
            "cu_rows": self.ends(lens),
            "first_positions": self.ids(len(lens), 9),
            "mode": self.one_of("sum", "weighted_sum", "max"),
            "out": self.rows(len(lens), n),
        }

    def silu_mul(self) -> Args:
        T, n = self.size(20, 0), self.size(90)
        return {"gate_up": self.rows(T, 2 * n), "out": self.rows(T, n)}

    gelu_mul = erf_gelu_mul = silu_mul

    def clamped_swiglu(self) -> Args:
        T, n = self.size(20, 0), self.size(90)
        return {"gate_up": self.rows(T, 2 * n), "alpha": 1.7, "limit": 7.0, "out": self.rows(T, n)}

    def softcap(self) -> Args:
        return {"x": self.rows(self.size(20, 0), self.size(90)), "cap": 30.0}

    def activate(self) -> Args:
        T, n = self.size(20, 0), self.size(90)
        names = "gelu", "gelu_tanh", "relu", "silu", "tanh"
        return {"x": self.rows(T, n), "activation": self.one_of(*names), "out": self.rows(T, n)}

    def rope(self) -> Args:
        T, H, G, D = self.size(9, 0), self.size(3), self.size(2), self.one_of(16, 64, 80)
        half = self.size(D // 2)
        return {
            "q": self.rows(T, H, D),
            "k": self.rows(T, G, D),
            "cos": self.floats(50, half),
            "sin": self.floats(50, half),
            "positions": self.ids(T, 50),
        }

    def append_kv(self) -> Args:
        T, G, N = self.size(20, 0), self.size(2), self.size(4, 2)
        D, S = self.one_of(16, 64, 80), self.one_of(16, 32)
        return {
            "k": self.rows(T, G, D),
            "v": self.rows(T, G, D),
            **self.caches(N, G, D, S),
            "slot_ids": self.ints(self._draw(st.permutations(range(N * S)))[:T], "int64"),
        }

    def rope_append_kv(self) -> Args:
        append = self.append_kv()
        T, G, D = append["k"].tensor.shape
        half = self.size(D // 2)
        turn = {
            "q": self.rows(T, self.size(3), D),
            "cos": self.floats(50, half),
            "sin": self.floats(50, half),
            "positions": self.ids(T, 50),
        }
        return {**append, **turn}

    def paged_attention(self) -> Args:
        G, N = self.size(2), self.size(6)
        H = G * self.size(3)
        D, S = self.one_of(16, 64, 80), self.one_of(16, 32)
        lens = self.lens(4, min(20, N * S))
        tables = [self._draw(st.permutations(range(N))) for _ in lens]
        return {
            "q": self.floats(sum(lens), H, D),
            **self.caches(N, G, D, S),
            "cu_seqlens_q": self.ends(lens),
            "kv_lens": self.ints([self.size(N * S, n) for n in lens]),
            "block_tables": self.ints(np.array(tables).reshape(len(lens), N)),
            "scale": 0.125,
            "window": self.size(20, 0),
            "softcap": self.one_of(0.0, 30.0),
            "is_causal": self.one_of(True, False),
            "out": self.floats(sum(lens), H, D),
            "sinks": self.one_of(None, self.floats(H)),
        }

    def linear(self) -> Args:
        T, K, N = self.size(40, 0), self.size(300), self.size(90)
        return {
            "x": self.rows(T, K),
            "weight": self.matrix(N, K),
            "bias": self.one_of(None, self.floats(N)),
            "out": self.rows(T, N),
        }

    def gated_linear(self) -> Args:
        T, K, n = self.size(40, 0), self.size(300), 32 * self.size(2)
        return {
            "x": self.rows(T, K),
            "weight": self.matrix(2 * n, K),
            "bias": self.one_of(None, self.floats(2 * n)),
            "activation": self.one_of("silu", "gelu_tanh", "gelu"),
            "out": self.rows(T, n),
        }

    def gated_mlp(self) -> Args:
        T, K, n, N = self.size(40, 0), self.size(300), 32 * self.size(5), self.size(90)
        return {
            "x": self.rows(T, K),
            "gate_up": self.matrix(2 * n, K),
            "gate_up_bias": self.one_of(None, self.floats(2 * n)),
            "activation": self.one_of("silu", "gelu_tanh", "gelu"),
            "product": self.rows(T, n),
            "down": self.matrix(N, n),
            "down_bias": self.one_of(None, self.floats(N)),
            "out": self.rows(T, N),
        }

    def embedding(self) -> Args:
        T, K, V = self.size(20, 0), self.size(300), self.size(90)
        return {"token_ids": self.ids(T, V), "weight": self.matrix(V, K), "out": self.rows(T, K)}

    def lora(self) -> Args:
        T, K, N = self.size(20, 0), self.size(90), self.size(90)
        shared = self.plan(T, K, N, is_embedding=False)
        return {"x": self.rows(T, K), **shared, "out": self.rows(T, N)}

    def lora_embedding(self) -> Args:
        T, V, N = self.size(20, 0), self.size(90, 8), self.size(90)
        shared = self.plan(T, V, N, is_embedding=True)
        return {"token_ids": self.ids(T, 7), **shared, "out": self.rows(T, N)}

    def score_tokens(self) -> Args:
        R, V = self.size(6, 0), self.size(90)
        K = self.size(min(5, V), 0)
        return {
            "logits": self.rows(R, V),
            "token_ids": self.ids(R, V),
            "num_top_logprobs": self.ids(R, K + 1),
            "out_logprobs": self.floats(R),
            "top_ids": self.ints(np.zeros((R, K))),
            "top_logprobs": Guarded(np.zeros((R, K)), "float32"),
            "reports_logits": self.one_of(True, False),
        }

    def sample(self) -> Args:
        R, V = self.size(6, 0), self.size(90)
        K, words = self.size(min(5, V), 0), -(-V // 32)
        tokens = self._draw(st.lists(st.integers(0, 9), min_size=R, max_size=R))
        biases = self._draw(st.lists(st.integers(0, 3), min_size=R, max_size=R))
        bits = self.ints(np.full((R, words), self.one_of(-1, 0, 5, -(2**31))))
        return {
            "logits": self.rows(R, V),
            "workspace": self.rows(R, V),
            "seen": self.ints(np.full((R, words), -1)),
            "temperature": Guarded([self.one_of(0.0, 1e-6, 0.7, 2.0, *FLOATS) for _ in range(R)], "float32"),
            "top_k": self.ints([self.one_of(-1, 0, 1, 3, V, 2**31 - 1, -(2**31)) for _ in range(R)]),
            "top_p": Guarded([self.one_of(1.0, 0.5, *FLOATS) for _ in range(R)], "float32"),
            "min_p": Guarded([self.one_of(0.0, 0.3, *FLOATS) for _ in range(R)], "float32"),
            "repetition_penalty": Guarded([self.one_of(1.0, 1.3, *FLOATS) for _ in range(R)], "float32"),
            "frequency_penalty": Guarded([self.one_of(0.0, 2.0, *FLOATS) for _ in range(R)], "float32"),
            "presence_penalty": Guarded([self.one_of(0.0, -2.0, *FLOATS) for _ in range(R)], "float32"),
            "seeds": self.ints([self.one_of(0, -(2**63), 2**63 - 1) for _ in range(R)], "int64"),
            "choices": self.ints([self.one_of(0, -1, 2**31 - 1) for _ in range(R)]),
            "positions": self.ints([self.one_of(0, -1, 2**63 - 1) for _ in range(R)], "int64"),
            "token_ids": self.ids(sum(tokens), V),
            "token_indptr": self.ends(tokens, "int64"),
            "prompt_lens": self.ints([self.one_of(0, n, n + 5, 2**31 - 1) for n in tokens]),
            "bias_ids": self.ids(sum(biases), V),
            "bias_values": Guarded([self.one_of(*FLOATS) for _ in range(sum(biases))], "float32"),
            "bias_indptr": self.ends(biases, "int64"),
            "bitmask": self.one_of(None, bits),
            "num_top_logprobs": self.ints([self.size(K, -1) for _ in range(R)]),
            "out_ids": self.ints(np.zeros(R)),
            "out_logprobs": Guarded(np.zeros(R), "float32"),
            "top_ids": self.ints(np.zeros((R, K))),
            "top_logprobs": Guarded(np.zeros((R, K)), "float32"),
            "reports_processed": self.one_of(True, False),
            "reports_logits": self.one_of(True, False),
        }


_STUBS = ast.parse((Path(engine.__file__).parent / "_native.pyi").read_text())
OPS = [
    f.name
    for f in _STUBS.body
    if isinstance(f, ast.FunctionDef) and f.args.args[:1] and f.args.args[0].arg == "ctx"
]
"""Everything that computes; `Arguments` has a method for each."""


_INCOMPLETE = _native.PackedMatrix(5, 7, "float32"), _native.PackedMatrix(5, 7, "int4_affine")


def spoiled(draw: Draw, value: Any) -> Any:
    """Something like `value` that is perhaps wrong."""
    if isinstance(value, View):
        return draw(st.sampled_from((value, None, 3)))
    if not isinstance(value, Guarded):
        if isinstance(value, (int, float)):
            return draw(st.sampled_from((*EXTREMES, *FLOATS, 0.5, "x", None)))
        wrong = None, 3, "x", *_INCOMPLETE, Guarded([1.0], "float32")
        return draw(st.sampled_from((*wrong, value)))
    how = draw(st.sampled_from(_WRONGS))
    return how(draw, value)


def _other_dtype(draw: Draw, array: Guarded) -> Any:
    return Guarded(np.zeros(array.numpy.shape), draw(st.sampled_from(DTYPES)))


def _other_shape(draw: Draw, array: Guarded) -> Any:
    return Guarded(np.ones(draw(st.lists(st.integers(0, 20), max_size=5))), array.dtype)


def _other_extent(draw: Draw, array: Guarded) -> Any:
    shape = list(array.numpy.shape)
    if shape:
        axis = draw(st.integers(0, len(shape) - 1))
        shape[axis] = max(0, shape[axis] + draw(st.sampled_from((-1, 1, 3))))
    return Guarded(np.ones(shape), array.dtype)


def _hostile_values(draw: Draw, array: Guarded) -> Any:
    if array.numpy.size:
        kind = array.numpy.dtype.kind
        info = np.iinfo(array.numpy.dtype) if kind in "iu" else None
        choices = FLOATS if info is None else [x for x in EXTREMES if info.min <= x <= info.max]
        for at in draw(st.lists(st.integers(0, array.numpy.size - 1), min_size=1, max_size=3)):
            array.numpy.reshape(-1)[at] = draw(st.sampled_from(choices))
    return array


def _backwards(draw: Draw, array: Guarded) -> Any:
    if not array.numpy.ndim or array.dtype == "bfloat16":
        return array
    axis = draw(st.integers(0, array.numpy.ndim - 1))
    return View(array, np.flip(array.numpy, axis))


def _turned(draw: Draw, array: Guarded) -> Any:
    if array.numpy.ndim < 2 or array.dtype == "bfloat16":
        return array
    return View(array, np.swapaxes(array.numpy, *draw(st.permutations(range(array.numpy.ndim)))[:2]))


def _repeated(draw: Draw, array: Guarded) -> Any:
    """Rows, or single elements, that all lie in the same place."""
    if not array.numpy.size or array.dtype == "bfloat16":
        return array
    keep = draw(st.integers(0, array.numpy.ndim))
    strides = [0] * keep + list(array.numpy.strides[keep:])
    return View(array, np.lib.stride_tricks.as_strided(array.numpy, array.numpy.shape, strides))


def _unaligned(draw: Draw, array: Guarded) -> Any:
    if array.dtype == "bfloat16":
        return array
    dtype, size = array.numpy.dtype, array.numpy.size
    raw = Guarded(np.zeros((size + 1) * dtype.itemsize), "uint8")
    begin = draw(st.integers(0, dtype.itemsize - 1))
    view = raw.numpy[begin : begin + size * dtype.itemsize].view(dtype).reshape(array.numpy.shape)
    return View(raw, view)


def _read_only(draw: Draw, array: Guarded) -> Any:
    view = array.numpy.view()
    view.flags.writeable = False
    return View(array, view)


_WRONGS = (
    _other_dtype,
    _other_shape,
    _other_extent,
    _hostile_values,
    _hostile_values,
    _backwards,
    _turned,
    _repeated,
    _unaligned,
    _read_only,
)


def plain(args: Args) -> Args:
    """As the native module takes them."""
    return {
        name: value.tensor if isinstance(value, (Guarded, View)) else value for name, value in args.items()
    }


def check(args: Args) -> None:
    for value in args.values():
        if isinstance(value, (Guarded, View)):
            value.check()
