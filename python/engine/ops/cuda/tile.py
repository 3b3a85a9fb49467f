"""How much of a product one program of a Triton kernel takes."""

from __future__ import annotations

from typing import NamedTuple

_WIDE = ("sm_90", "sm_100", "sm_103")


class Tile(NamedTuple):
    """`num_warps` and `num_stages` as Triton has them: warps of a program, and loads in flight of a loop."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


def has_wide_products(isa: str) -> bool:
    """Whether tensor cores read operands from shared memory, of which a block may have 200 KiB there."""
    return isa in _WIDE
