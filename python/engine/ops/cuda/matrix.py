"""Weights of linear layers on a GPU, and products with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from engine.errors import NativeError
from engine.ops.cuda import codes as coding
from engine.ops.cuda import fp8_product

if TYPE_CHECKING:
    from engine.ops.cuda.context import ExecutionContext

FLOATS = ("bfloat16", "float16", "float32")
PACKED_ELEMENTS = 16 << 20
"""Of weights that are rounded at once."""


class PackedMatrix:
    """Weights [N, K] on the default device: `dtype` is one of FLOATS, "int8", "int4", "int4_affine" or "fp8".

    int8, int4 and int4_affine are the CPU's formats to the bit, but activations stay as they are: the numbers
    that products and lookups use are the codes times their scales. fp8 is float8_e4m3fn with a scale for each
    row. `group_len` (32 or 128; 0: 128 for int8, 32 for int4) k of a row share a scale.

    Shapes: `stored` is [N, K] of floats; else codes uint8, k filled up with zeros to a multiple of 128 bytes:
    [N, k] for int8 and fp8; for int4 [N, k / 2], a byte of which holds a code of an even group and, in its
    high bits, one of the group that follows. `scales` are [groups, N], for fp8 [N]; `offsets` [groups, N].
    """

    def __init__(self, out_features: int, in_features: int, dtype: str, group_len: int = 0) -> None:
        if dtype not in FLOATS and dtype not in coding.FORMATS:
            raise NativeError(
                f"dtype: expected one of {', '.join((*FLOATS, *coding.FORMATS))}, got {dtype!r}"
            )
        if group_len not in (0, 32, 128) or (group_len and dtype not in coding.GROUP_LEN):
            raise NativeError(f"group_len: expected 0, or 32 or 128 for codes in groups, got {group_len}")
        if out_features < 1 or in_features < 1:
            raise NativeError(f"expected at least one row and column, got [{out_features}, {in_features}]")
        self.out_features, self.in_features, self.dtype = out_features, in_features, dtype
        self.is_coded = dtype in coding.FORMATS
        self.group_len = group_len or coding.GROUP_LEN.get(dtype, 0)
        """0 where weights are not quantised in groups."""
        self.scales = self.offsets = None
        if self.is_coded:
            self._allocate_codes()
        else:
            self.stored = torch.empty(out_features, in_features, dtype=getattr(torch, dtype))
        self.is_complete = False
        """Every row has been packed; the products refuse a matrix of which that is not true."""
        self._is_packed = torch.zeros(out_features, dtype=torch.bool, device="cpu")
        self._column_scales: torch.Tensor | None = None
        self._column_order: torch.Tensor | None = None

    def _allocate_codes(self) -> None:
        num_groups = coding.num_groups(self.in_features, self.dtype, self.group_len)
        num_bytes = coding.bytes_of_row(self.in_features, self.dtype)
        self.stored = torch.zeros(self.out_features, num_bytes, dtype=torch.uint8)
        if self.dtype == "fp8":
            self.scales = torch.zeros(self.out_features)
            return
        scale_dtype = torch.float16 if self.dtype == "int4" else torch.float32
        self.scales = torch.zeros(num_groups, self.out_features, dtype=scale_dtype)
        if self.dtype == "int4_affine":
            self.offsets = torch.zeros(num_groups, self.out_features)

    @property
    def weight(self) -> torch.Tensor:
        """Of floats: [N, K] as torch multiplies it."""
        assert not self.is_coded
        return self.stored

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in (self.stored, self.scales, self.offsets) if part is not None)

    @property
    def column_scales(self) -> list[float]:
        """What activations are multiplied by, a power of two for each column, or none."""
        return [] if self._column_scales is None else self._column_scales.tolist()

    @property
    def balanced_columns(self) -> torch.Tensor:
        """The same as float32 [K] on the device, ones where there are none."""
        if self._column_scales is None:
            return torch.ones(self.in_features, device=self.stored.device)
        return self._column_scales

    @property
    def column_order(self) -> list[int]:
        """The input column of each packed one; empty where they are in order."""
        return [] if self._column_order is None else self._column_order.tolist()

    @column_order.setter
    def column_order(self, order: Sequence[int]) -> None:
        if order and sorted(order) != list(range(self.in_features)):
            raise NativeError(f"column_order: expected each column from 0 to {self.in_features - 1} once")
        self._column_order = torch.tensor(order, device=self.stored.device) if order else None

    def balance_columns(self, ctx: ExecutionContext, parts: Sequence[torch.Tensor]) -> None:
        """Before any row is packed: scale columns that are far larger than the others, so that they do not
        take their groups' precision. `parts` [n, K] are all rows."""
        device = self.stored.device
        pieces = (part[some].to(device) for part in parts for some in self._pieces(len(part)))
        scales = coding.column_scales(pieces)
        self._column_scales = None if scales.eq(1).all() else scales

    def pack_rows(self, ctx: ExecutionContext, row_start: int, weight: torch.Tensor) -> None:
        """Store `weight` [n, K] of any float type as the rows from `row_start` on, rounded to nearest."""
        rows = self._rows(row_start, weight, "weight")
        for some in self._pieces(len(weight)):
            theirs = slice(row_start + some.start, row_start + some.stop)
            self._pack_piece(theirs, weight[some].to(self.stored.device))
        self._note(rows)

    def _pieces(self, num_rows: int) -> list[slice]:
        """A large matrix at once would take several times its own memory."""
        step = max(1, PACKED_ELEMENTS // self.in_features)
        return [slice(first, min(first + step, num_rows)) for first in range(0, num_rows, step)]

    def _pack_piece(self, rows: slice, weight: torch.Tensor) -> None:
        if not self.is_coded:
            self.stored[rows] = weight.to(self.stored.dtype)
            return
        weight = weight.float()
        if self._column_scales is not None:
            weight = weight / self._column_scales
        codes, scales = coding.quantize(weight, self.dtype, self.group_len)
        self._store(rows, codes, scales, None)

    def pack_codes(
        self,
        ctx: ExecutionContext,
        row_start: int,
        codes: torch.Tensor,
        scales: torch.Tensor,
        offsets: torch.Tensor | None = None,
    ) -> None:
        """Store rows that are quantized already, exactly; arguments as for the CPU's."""
        if self.dtype not in coding.GROUP_LEN:
            raise NativeError(f"codes: a matrix of {self.dtype} takes none")
        rows = self._rows(row_start, codes, "codes")
        expected = len(codes), -(-self.in_features // self.group_len)
        for name, part in (("scales", scales), ("offsets", offsets)):
            if part is not None and tuple(part.shape) != expected:
                raise NativeError(f"{name}: expected {list(expected)}, got {list(part.shape)}")
        if (offsets is None) != (self.offsets is None):
            raise NativeError(
                f"offsets: expected {'none' if self.offsets is None else 'some'} for {self.dtype}"
            )
        for some in self._pieces(len(codes)):
            theirs = slice(row_start + some.start, row_start + some.stop)
            self._store(theirs, codes[some], scales[some], None if offsets is None else offsets[some])
        self._note(rows)

    def _rows(self, row_start: int, part: torch.Tensor, name: str) -> slice:
        end = row_start + len(part)
        if part.ndim != 2 or part.shape[1] != self.in_features:
            raise NativeError(f"{name}: expected [n, {self.in_features}], got {list(part.shape)}")
        if row_start < 0 or end > self.out_features:
            raise NativeError(f"{name}: rows {row_start} to {end} are not among {self.out_features}")
        return slice(row_start, end)

    def _note(self, rows: slice) -> None:
        self._is_packed[rows] = True
        self.is_complete = bool(self._is_packed.all())

    def _store(
        self, rows: slice, codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None
    ) -> None:
        stored = coding.bytes_of(codes.to(self.stored.device), self.dtype, self.group_len)
        self.stored[rows] = stored
        if self.dtype == "fp8":
            self.scales[rows] = scales
            return
        for place, part in ((self.scales, scales), (self.offsets, offsets)):
            if part is not None:
                place[: part.shape[1], rows] = part.T.to(place)

    def fit(self, x: torch.Tensor) -> torch.Tensor:
        """Activations in the order and the size that the packed columns have."""
        if self._column_order is not None:
            x = x[:, self._column_order]
        return x if self._column_scales is None else x * self._column_scales.to(x.dtype)

    def unfit(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of weights as they were before their columns were ordered and scaled."""
        if self._column_scales is not None:
            rows = rows * self._column_scales.to(rows.dtype)
        if self._column_order is not None:
            rows = torch.empty_like(rows).index_copy_(1, self._column_order, rows)
        return rows


def linear(
    ctx: ExecutionContext, x: torch.Tensor, weight: PackedMatrix, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """out = x weightᵀ + bias: weights of floats by torch, codes by Triton, fp8 by one or the other as
    `fp8_product` has it, and all by Triton where a row's bits must not depend on its batch.

    Shapes: x [T, K] of the model's dtype; out [T, N] of that or float32, both with any row stride; bias
    float32 [N].
    """
    if not weight.is_complete:
        raise NativeError("weight: not all of its rows have been packed")
    if fp8_product.is_chosen(ctx, x, weight, out):
        fp8_product.multiply(x, weight, bias, out)
    elif weight.is_coded or ctx.is_deterministic:
        from engine.ops.cuda import triton_product  # Triton only where it is needed

        x = weight.fit(x) if weight.is_coded else x.to(weight.stored.dtype)  # a router is float32
        triton_product.multiply(ctx, x, weight, bias, out)
    elif out.dtype != x.dtype:
        _multiply_widely(x, weight.weight, out)
        if bias is not None:
            out.add_(bias)
    elif bias is None:
        torch.mm(x, weight.weight.T, out=out)
    else:
        torch.addmm(bias.to(x.dtype), x, weight.weight.T, out=out)


def _multiply_widely(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """The float32 sums, not rounded to the dtype of the factors; of a router, weights are float32 beside rows
    that are not."""
    if x.is_cuda and weight.dtype == x.dtype:
        torch.mm(x, weight.T, out_dtype=out.dtype, out=out)
    else:
        torch.mm(x.to(out.dtype), weight.T.to(out.dtype), out=out)
