"""Types of the native module. Tensor arguments take any DLPack tensor and are borrowed for the call."""

from typing import Any

Tensor = Any

# --- context --------------------------------------------------------------------------------

class ExecutionContext:
    """Instruction set and threads of one engine. isa: "auto" or a name from available_isas()."""

    def __init__(self, num_threads: int, isa: str = "auto") -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def num_threads(self) -> int: ...

def available_isas() -> list[str]:
    """Instruction sets that this build and this machine have, slowest first."""

def cuda_is_compiled() -> bool: ...
def num_cuda_devices() -> int: ...

# --- normalisation -----------------------------------------------------------------------------

def rms_norm(ctx: ExecutionContext, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None: ...
def add_rms_norm(
    ctx: ExecutionContext, x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor
) -> None: ...

# --- sampling ------------------------------------------------------------------------------------

def sample(
    ctx: ExecutionContext,
    *,
    logits: Tensor,
    workspace: Tensor,
    seen: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    repetition_penalty: Tensor,
    frequency_penalty: Tensor,
    presence_penalty: Tensor,
    seeds: Tensor,
    choices: Tensor,
    positions: Tensor,
    token_ids: Tensor,
    token_indptr: Tensor,
    prompt_lens: Tensor,
    bias_ids: Tensor,
    bias_values: Tensor,
    bias_indptr: Tensor,
    bitmask: Tensor | None,
    num_top_logprobs: Tensor,
    out_ids: Tensor,
    out_logprobs: Tensor,
    top_ids: Tensor,
    top_logprobs: Tensor,
) -> None: ...
