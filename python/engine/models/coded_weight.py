"""Weights that a checkpoint stores in few bits, on their way into a packed matrix."""

from __future__ import annotations

import dataclasses

import torch

ZERO_CODE = {"int8": 128, "int4": 8}


@dataclasses.dataclass(frozen=True)
class CodedWeight:
    """Rows of a matrix [N, K] as `PackedMatrix.pack_codes` takes them.

    Shapes: codes uint8 [N, K]; scales [N, groups], float16 for "int4", else float32; offsets float32
    [N, groups] for "int4_affine", else None. `column_order` int [K] is the input column of each one here,
    None where they are in order.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None = None
    column_order: torch.Tensor | None = None

    def rows(self, index: torch.Tensor) -> CodedWeight:
        """Some rows, or all in another order."""
        offsets = None if self.offsets is None else self.offsets[index]
        return dataclasses.replace(self, codes=self.codes[index], scales=self.scales[index], offsets=offsets)
