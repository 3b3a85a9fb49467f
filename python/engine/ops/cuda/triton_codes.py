"""Numbers of 8 bits, decoded in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def e4m3_to_float(codes, FACTOR: tl.constexpr = 1.0):
    """float32 of the bits (uint8) of finite float8_e4m3fn numbers, exactly, on GPUs of any age; times
    `FACTOR`, a power of two.

    Their exponent and mantissa become those of a float32 that is 2**120 times smaller.
    """
    bits = codes.to(tl.uint32)
    moved = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
    return moved.to(tl.float32, bitcast=True) * (1.329227995784916e36 * FACTOR)
