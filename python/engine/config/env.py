"""The only reader of environment variables. A flag that says the same wins."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

CPU_ISA = "ENGINE_CPU_ISA"
API_KEY = "ENGINE_API_KEY"


@dataclasses.dataclass(frozen=True)
class Environment:
    """What the environment asks for; empty variables count as unset."""

    cpu_isa: str | None = None
    """Instruction set of the CPU kernels, instead of the best one that the machine has."""

    api_key: str | None = dataclasses.field(default=None, repr=False)
    """One more accepted API key; unlike a flag it does not show in the list of processes."""


def read_environment(variables: Mapping[str, str] = os.environ) -> Environment:
    return Environment(
        cpu_isa=variables.get(CPU_ISA) or None,
        api_key=variables.get(API_KEY) or None,
    )
