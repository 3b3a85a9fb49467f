"""The engine's loop with adapters: what is read holds nobody up, and every request ends."""

from __future__ import annotations

import dataclasses
import threading
import time

import numpy as np
import pytest

from engine.adapters.adapter_pool import AdapterPool
from engine.core.engine_core import EngineCore
from engine.core.messages import (
    AdapterLoaded,
    AdapterRef,
    CancelRequest,
    Failed,
    GenerateRequest,
    LoadAdapter,
    TokenChunk,
    UnloadAdapter,
    UnpinAdapter,
)
from engine.errors import InvalidRequest
from engine.sampling.params import SamplingParams
from engine.scheduling.settings import SchedulerSettings
from helpers.engines import FakeRunner
from helpers.prefix_cache import PlainPrefixCache

SETTINGS = SchedulerSettings(
    context_length=512,
    vocab_size=50,
    max_running_requests=8,
    max_queued_requests=100,
    chunked_prefill_size=64,
    debug_checks=True,
)
PARAMS = SamplingParams(temperature=0, max_tokens=5)
PROMPT = np.arange(1, 40, dtype="<i4").tobytes()


@dataclasses.dataclass(frozen=True)
class Loaded:
    digest: str
    weights: object
    rank: int = 1


class Engine:
    """A core, and the reader of its adapters: read when the test says so; a directory called bad is bad."""

    def __init__(self, max_loaded: int = 2, max_in_use: int = 2) -> None:
        self.gate = threading.Event()
        self.pool = AdapterPool(self, max_loaded=max_loaded, max_in_use=max_in_use)
        self.runner = FakeRunner(64, 16)
        self.core = EngineCore(SETTINGS, self.runner, PlainPrefixCache(64, 16), adapters=self.pool)
        self.messages: list = []

    def check(self, directory: str) -> Loaded:
        return self.load(directory)

    def load(self, directory: str) -> Loaded:
        assert self.gate.wait(60)
        if directory == "bad":
            raise InvalidRequest("it is bad", slug="invalid_adapter")
        return Loaded(directory, object())

    def ask(self, name: str, adapter: str | None = None, **fields) -> None:
        ref = None if adapter is None else AdapterRef(adapter, adapter)
        self.core.handle(GenerateRequest(name, PROMPT, PARAMS, adapter=ref, **fields))

    def step_until(self, condition) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            self.messages += self.core.step()

    def is_over(self, name: str) -> bool:
        return any(
            isinstance(m, Failed) or (isinstance(m, TokenChunk) and m.finish_reason)
            for m in self.messages
            if getattr(m, "request_id", "") == name
        )

    def tokens(self, name: str) -> list[int]:
        chunks = [m for m in self.messages if isinstance(m, TokenChunk) and m.request_id == name]
        return [token for chunk in chunks for token in chunk.token_ids]

    def run_out(self) -> None:
        self.step_until(lambda: not self.core.has_work)
        assert self.pool.num_in_use == 0 and self.core.stats().num_blocks_in_use == 0


@pytest.fixture
def engine():
    engine = Engine()
    yield engine
    engine.gate.set()
    engine.core.close()


def test_others_go_on_while_an_adapter_is_read(engine):
    engine.ask("with", "a")
    engine.ask("without")
    engine.step_until(lambda: engine.is_over("without"))
    assert engine.tokens("with") == [] and engine.core.stats().num_waiting == 1
    engine.gate.set()
    engine.step_until(lambda: engine.is_over("with"))
    assert engine.tokens("with") == engine.tokens("without")
    engine.run_out()


def test_prefixes_of_another_adapter_are_not_taken(engine):
    engine.gate.set()
    cached = {}
    for name, adapter in (("1", "a"), ("2", "a"), ("3", "b"), ("4", None), ("5", None), ("6", "b")):
        engine.ask(name, adapter)
        engine.step_until(lambda name=name: engine.is_over(name))
        cached[name] = next(
            m.cached_tokens for m in engine.messages if m.request_id == name and hasattr(m, "cached_tokens")
        )
    assert cached == {"1": 0, "2": 32, "3": 0, "4": 0, "5": 32, "6": 32}


def test_a_request_whose_adapter_is_bad_fails_alone(engine):
    engine.ask("bad", "bad", n=3)
    engine.ask("good", "a")
    engine.gate.set()
    engine.step_until(lambda: engine.is_over("bad") and engine.is_over("good"))
    failures = [m for m in engine.messages if isinstance(m, Failed)]
    assert [(f.request_id, f.kind, f.slug) for f in failures] == [("bad", "NotFound", "adapter_not_found")]
    assert len(engine.tokens("good")) == 5
    engine.run_out()


def test_cancelled_while_its_adapter_is_read(engine):
    engine.ask("a", "a")
    engine.ask("b", "b")
    engine.ask("c", "c")  # has no place yet
    engine.core.step()
    for name in "abc":
        engine.core.handle(CancelRequest(name))
    assert engine.pool.num_in_use == 0 and engine.core.stats().num_waiting == 0
    engine.gate.set()
    engine.run_out()
    engine.ask("again", "c")
    engine.step_until(lambda: engine.is_over("again"))
    assert len(engine.tokens("again")) == 5


def test_waiting_for_a_load_sleeps(engine):
    """An engine with nothing else to do steps a few times in a while, not thousands of times."""
    engine.ask("a", "a")
    began, steps = time.monotonic(), 0
    while time.monotonic() < began + 0.1:
        engine.core.step()
        steps += 1
    assert steps < 50


def test_loads_are_answered_in_order_beside_requests(engine):
    for directory in ("a", "bad", "b"):
        engine.core.handle(LoadAdapter(directory))
    engine.ask("without")
    engine.step_until(lambda: engine.is_over("without"))
    assert engine.core.has_work, "answers are due"
    engine.gate.set()
    engine.step_until(lambda: not engine.core.has_work)
    answers = [m for m in engine.messages if isinstance(m, AdapterLoaded)]
    assert [(a.directory, a.digest, a.error) for a in answers] == [
        ("a", "a", None), ("bad", "", "it is bad"), ("b", "b", None),
    ]  # fmt: skip
    stats = engine.core.stats()
    assert (stats.num_adapters_loaded, stats.num_adapters_in_use) == (2, 0)
    engine.core.handle(UnloadAdapter("a"))
    assert engine.core.stats().num_adapters_loaded == 1


@pytest.mark.parametrize("message", [UnpinAdapter, UnloadAdapter])
def test_a_pinned_one_that_may_go_makes_room_for_who_waits(engine, message):
    engine.gate.set()
    engine.core.handle(LoadAdapter("a", True))
    engine.step_until(lambda: engine.messages)
    engine.ask("b", "b")
    engine.step_until(lambda: engine.tokens("b"))
    engine.ask("c", "c")
    engine.messages += engine.core.step()
    assert engine.pool.num_in_use == 1
    engine.core.handle(message("a"))
    engine.messages += engine.core.step()
    assert engine.pool.num_in_use == 2 and not engine.is_over("b")
    engine.step_until(lambda: engine.is_over("c"))
    engine.run_out()


def test_an_engine_without_adapters_says_so():
    core = EngineCore(SETTINGS, FakeRunner(64, 16), PlainPrefixCache(64, 16))
    core.handle(LoadAdapter("a"))
    core.handle(UnloadAdapter("a"))
    core.handle(UnpinAdapter("a"))
    core.handle(GenerateRequest("r", PROMPT, PARAMS, adapter=AdapterRef("a", "a")))
    answer, failed = core.step()
    assert isinstance(answer, AdapterLoaded) and answer.error
    assert isinstance(failed, Failed) and failed.param == "lora_path"


def test_many_adapters_in_few_places():
    engine = Engine(max_loaded=3, max_in_use=2)
    engine.gate.set()
    for number in range(90):
        engine.ask(f"r{number}", f"a{number * 7 % 12}")
    engine.step_until(lambda: all(engine.is_over(f"r{number}") for number in range(90)))
    assert all(len(engine.tokens(f"r{number}")) == 5 for number in range(90))
    engine.run_out()
    engine.core.close()
