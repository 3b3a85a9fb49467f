"""Wiring an engine together: what goes wrong is one line."""

from __future__ import annotations

import logging

import pytest

from engine.config.engine_config import EngineConfig
from engine.core.build import build_engine
from engine.core.resolve import Machine
from engine.demo import MODEL_DIR
from engine.errors import ConfigError
from engine.runner.gpu import Gpu

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


GUESSES_WAIT = "--speculative ngram guesses from tokens that are known: steps wait for the one before"


@pytest.mark.parametrize(
    ("device", "speculative", "said"), [("cuda", "ngram", 1), ("cuda", "off", 0), ("cpu", "ngram", 0)]
)
def test_who_has_guesses_on_a_gpu_is_told_that_steps_wait(monkeypatch, caplog, device, speculative, said):
    """On the CPU they always do."""
    gpu = Gpu(name="none", capability=(9, 0), total_bytes=80 << 30, free_bytes=79 << 30)

    def stop(*_, **__):
        raise NotImplementedError

    machine = Machine(num_cores=2, memory_bytes=8 << 30, gpu=gpu if device == "cuda" else None)
    monkeypatch.setattr(Machine, "this", lambda device: machine)
    monkeypatch.setattr("engine.core.build.on_device", stop)
    config = EngineConfig(model_path=str(MODEL_DIR), device=device, speculative=speculative)
    with caplog.at_level(logging.INFO), pytest.raises(NotImplementedError):
        build_engine(config)
    assert [record.message for record in caplog.records].count(GUESSES_WAIT) == said
