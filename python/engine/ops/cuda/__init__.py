"""The ops of decoders and encoders on an NVIDIA GPU, with the names and arguments of `engine.ops.native`.

What differs: tensors lie on the device, activations have the model's dtype, keys of the cache lie as values
do, and the plan of a step is a `plan.DevicePlan`. A name is imported when it is first used: Triton and CUDA
only where there is a GPU.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "ExecutionContext": "context",
    "ExpertMatrices": "mixture",
    "LoraAdapter": "low_rank",
    "LoraPlan": "low_rank",
    "PackedMatrix": "matrix",
    "activate": "gated",
    "add_rms_norm": "norm",
    "append_kv": "attention",
    "are_alike": "mixture",
    "clamped_swiglu": "gated",
    "embedding": "lookup",
    "erf_gelu_mul": "gated",
    "experts": "mixture",
    "gelu_mul": "gated",
    "layer_norm": "norm",
    "linear": "matrix",
    "lora": "low_rank",
    "lora_embedding": "low_rank",
    "paged_attention": "attention",
    "pool": "pooling",
    "rms_norm": "norm",
    "rope_append_kv": "attention",
    "sample": "sampling",
    "score_tokens": "sampling",
    "silu_mul": "gated",
    "softcap": "gated",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value  # the next use costs nothing
    return value
