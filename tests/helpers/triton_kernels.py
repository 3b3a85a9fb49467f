"""Import this before kernels of Triton: where there is no GPU, they then run under Triton's interpreter.

The interpreter keeps bfloat16 as integers of 16 bits. Its casts cut them off and its products multiply the
integers; here both do what a GPU does.
"""

from __future__ import annotations

import os
import sys
import types

import numpy as np
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":  # tests/conftest.py saw a GPU, or none ran
    assert not any(name.startswith("engine.ops.cuda.triton_") for name in sys.modules), "they are compiled"
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

_Builder = interpreter.InterpreterBuilder
_cast, _dot = _Builder.cast_impl, _Builder.create_dot


def _round(builder, source, dtype):
    if dtype.scalar != tl.bfloat16 or source.dtype.scalar == tl.bfloat16:
        return _cast(builder, source, dtype)
    wide = torch.from_numpy(np.ascontiguousarray(source.data, np.float32))
    bits = wide.bfloat16().view(torch.int16).numpy().view(np.uint16)
    return interpreter.TensorHandle(bits.reshape(source.data.shape), tl.bfloat16)


def _multiply(builder, a, b, d, input_precision, max_num_imprecise_acc):
    wide = [_cast(builder, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)]
    return _dot(builder, *wide, d, input_precision, max_num_imprecise_acc)


_Builder.cast_impl, _Builder.create_dot = _round, _multiply


def context(isa: str = "sm_90", *, is_deterministic: bool = False) -> types.SimpleNamespace:
    """What kernels ask of an ExecutionContext."""
    return types.SimpleNamespace(isa=isa, is_deterministic=is_deterministic)
