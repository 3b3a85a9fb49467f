"""Parameters of transformers modules that are our packed matrices.

A module keeps its own code. What its weights are changes: an object that torch's functions ask how it is
multiplied (the `__torch_function__` protocol) stands where the parameter was, so `nn.Linear`, `F.linear` on a
router's or an expert's weight, and `addmm` of older models all end in our product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from engine.models.layers import FusedLinear, NamedSlots
from engine.models.weights import Slot

_PLAIN_PRODUCTS = (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__)


class UnknownUse(Exception):
    """A module does something with a weight that is neither a product nor a look-up."""

    def __init__(self, name: str, use: str) -> None:
        super().__init__(f"{name} is used in {use}")
        self.name = name


class _Weight:
    """What modules may ask of any of them. Activations are float32, so that is what weights say they are."""

    dtype = torch.float32
    device = torch.device("cpu")
    requires_grad = False
    is_meta = False

    def __init__(self, name: str, shape: torch.Size) -> None:
        self.name, self.shape, self.ndim = name, shape, len(shape)

    def to(self, *_args: Any, **_kwargs: Any) -> Any:
        return self

    type = float = contiguous = detach = to

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def _refuse(self, *_: Any) -> Any:
        raise UnknownUse(self.name, "arithmetic or a selection")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __neg__ = _refuse
    __matmul__ = __getitem__ = _refuse

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnknownUse(self.__dict__.get("name", ""), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and isinstance(args[1], PackedWeight):
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            return args[1].multiply(args[0], bias, is_transposed=False)
        if func is F.embedding and isinstance(args[1], PackedWeight):
            return args[1].look_up(args[0])
        if func is torch.addmm and isinstance(args[2], PackedWeight) and not kwargs:
            return args[2].multiply(args[1], args[0], is_transposed=True)
        if func in _PLAIN_PRODUCTS and isinstance(args[1], PackedWeight):
            return args[1].multiply(args[0], None, is_transposed=True)
        if func in _PLAIN_PRODUCTS and isinstance(args[1], _Transposed):
            return args[1].of.multiply(args[0], None, is_transposed=False)
        weight = next(arg for arg in (*args, *kwargs.values()) if isinstance(arg, _Weight))
        raise UnknownUse(weight.name, getattr(func, "__name__", str(func)))


class PackedWeight(_Weight):
    """A matrix [out, in], or [in, out] in a model that multiplies from the other side, which its first
    product tells. Before `allocate` products are 0: enough to see where a model goes.

    `is_exact`: never stored in fewer bits than the checkpoint's, as a router must be.
    """

    def __init__(self, name: str, shape: torch.Size, *, is_exact: bool) -> None:
        super().__init__(name, shape)
        self.is_exact = is_exact
        self._is_transposed: bool | None = None
        self._linear: FusedLinear | None = None

    def allocate(self, ops: ModuleType, ctx: Any, stored: str, exact: str) -> None:
        """Raises: MemoryError."""
        rows, columns = reversed(self.shape) if self._is_transposed else self.shape
        name, dtype = self.name.removesuffix(".weight"), exact if self.is_exact else stored
        self._linear, self._ops, self._ctx = FusedLinear(ops, ctx, [(name, rows)], columns, dtype), ops, ctx

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None, *, is_transposed: bool) -> torch.Tensor:
        """x wᵀ + bias, float32 [..., out], of `x` [..., in]; w itself where `is_transposed`."""
        if self._is_transposed not in (None, is_transposed):
            raise UnknownUse(self.name, "products from both sides")
        self._is_transposed = is_transposed
        out_features = self.shape[1] if is_transposed else self.shape[0]
        if self._linear is None:
            return torch.zeros(*x.shape[:-1], out_features)
        rows = x.reshape(-1, x.shape[-1]).contiguous().float()
        out = torch.empty(len(rows), out_features)
        if len(rows) > 0:
            self._ops.linear(self._ctx, rows, self._linear.weight, bias, out)
        return out.view(*x.shape[:-1], out_features)

    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        """Float32 [..., in] of rows by their number [...]."""
        if self._is_transposed:
            raise UnknownUse(self.name, "look-ups of columns")
        self._is_transposed = False
        out = torch.zeros(ids.numel(), self.shape[1])
        if self._linear is not None:
            self._ops.embedding(self._ctx, ids.reshape(-1).int(), self._linear.weight, out)
        return out.view(*ids.shape, self.shape[1])

    @property
    def T(self) -> _Transposed:
        return _Transposed(self)

    def slots(self) -> NamedSlots:
        assert self._linear is not None
        slot = Slot(tuple(self.shape), self.store, matrix=self._linear.weight)
        yield self.name, slot

    def store(self, weight: torch.Tensor) -> None:
        assert self._linear is not None
        self._linear.fill([weight.T.contiguous() if self._is_transposed else weight.contiguous()])

    def adopt_orientation(self, other: PackedWeight) -> None:
        self._is_transposed = other._is_transposed


class _Transposed(_Weight):
    """What a module that multiplies by `weight.T` asks for."""

    def __init__(self, of: PackedWeight) -> None:
        super().__init__(of.name, torch.Size(reversed(of.shape)))
        self.of = of


class PackedStack(_Weight):
    """The matrices of all experts, [experts, out, in] or [experts, in, out], each packed by itself."""

    def __init__(self, name: str, shape: torch.Size, *, is_exact: bool) -> None:
        super().__init__(name, shape)
        self._items = [
            PackedWeight(f"{name}[{index}]", torch.Size(shape[1:]), is_exact=is_exact)
            for index in range(shape[0])
        ]

    def __getitem__(self, index: Any) -> PackedWeight:
        if not isinstance(index, int) and not (isinstance(index, torch.Tensor) and index.ndim == 0):
            raise UnknownUse(self.name, f"a choice by {type(index).__name__}")
        return self._items[int(index)]

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[PackedWeight]:
        return iter(self._items)

    def allocate(self, ops: ModuleType, ctx: Any, stored: str, exact: str) -> None:
        """All are oriented like those that the dry run met; one that met none is like `F.linear`'s."""
        met = next((item for item in self._items if item._is_transposed is not None), self._items[0])
        for item in self._items:
            item.adopt_orientation(met)
            item.allocate(ops, ctx, stored, exact)

    def slots(self) -> NamedSlots:
        yield self.name, Slot(tuple(self.shape), self._store)

    def _store(self, weights: torch.Tensor) -> None:
        for item, weight in zip(self._items, weights, strict=True):
            item.store(weight)


def packed(name: str, shape: torch.Size, *, is_exact: bool) -> PackedWeight | PackedStack:
    """A stand-in for a parameter of two or three dimensions."""
    kind = PackedWeight if len(shape) == 2 else PackedStack
    return kind(name, shape, is_exact=is_exact)
