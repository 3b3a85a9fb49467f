"""The adapters of an engine, around what reads them for its model."""

from __future__ import annotations

from engine.adapters.adapter_pool import AdapterPool, Reader
from engine.config.engine_config import EngineConfig
from engine.scheduling.adapter_queue import AdapterQueue


def build_adapters(
    config: EngineConfig, reader: Reader | None
) -> tuple[AdapterPool, AdapterQueue] | tuple[None, None]:
    """The pool, and the queue for its places; neither for a model that takes no adapters."""
    if reader is None:
        return None, None
    pool = AdapterPool(reader, max_loaded=config.max_loaded_loras, max_in_use=config.max_loras_per_batch)
    return pool, AdapterQueue(pool)
