"""Wiring an engine together: what goes wrong is one line."""

from __future__ import annotations

import pytest

from engine.config.engine_config import EngineConfig
from engine.core.build import build_engine
from engine.demo import MODEL_DIR
from engine.errors import ConfigError

TORCH_SAYS = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
)


@pytest.mark.parametrize("error", [RuntimeError(TORCH_SAYS), MemoryError()])
def test_too_little_memory_names_the_flags(monkeypatch, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr("engine.runner.model_runner.ModelRunner", refuse)
    with pytest.raises(ConfigError, match=r"lower --max-running-requests \(60000\), --chunked"):
        build_engine(EngineConfig(model_path=str(MODEL_DIR), max_running_requests=60_000))


def test_other_failures_keep_their_traceback(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr("engine.runner.model_runner.ModelRunner", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        build_engine(EngineConfig(model_path=str(MODEL_DIR)))
