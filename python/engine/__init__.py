"""An LLM inference engine with radix-tree prefix reuse and an OpenAI-compatible server.

Public names are resolved on first use, so that `import engine` stays cheap: the server
process must never import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "LLM": "engine.core.llm",
    "AsyncEngine": "engine.core.async_engine",
    "EngineConfig": "engine.config.engine_config",
    "SamplingParams": "engine.sampling.params",
    "EngineError": "engine.errors",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from engine.config.engine_config import EngineConfig
    from engine.core.async_engine import AsyncEngine
    from engine.core.llm import LLM
    from engine.errors import EngineError
    from engine.sampling.params import SamplingParams


def __getattr__(name: str) -> Any:
    module = _PUBLIC.get(name)
    if module is None:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted(__all__)
