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
