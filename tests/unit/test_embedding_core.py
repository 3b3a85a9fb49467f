"""EmbeddingCore: batches, turns, limits, failures, cancels; with an embedder that only adds up."""

from __future__ import annotations

import numpy as np
import pytest

from engine.core import embedding_queue
from engine.core.embedding_core import EmbeddingCore
from engine.core.engine_core import EngineCore
from engine.core.messages import (
    AdapterRef,
    Admitted,
    CancelRequest,
    Embedded,
    EmbeddingInfo,
    EmbedRequest,
    Failed,
    GenerateRequest,
)
from engine.core.step_board import StepBoard
from engine.errors import DeviceLost, InvalidRequest, Overloaded
from engine.sampling.params import SamplingParams
from engine.scheduling.adapter_queue import AdapterQueue
from engine.scheduling.settings import Places, SchedulerSettings
from helpers.engines import FakeRunner
from helpers.prefix_cache import PlainPrefixCache
from helpers.scheduling import AdapterSlots

VOCAB_SIZE, MAX_LEN, BUDGET = 50, 40, 16
POISON, BROKEN = 49, 48


class AddingEmbedder:
    """A text's vector is (its length, the sum of its tokens); a batch takes two slices and a second each."""

    adapter_reader = None

    def __init__(self, clock) -> None:
        self.info = EmbeddingInfo(2, MAX_LEN, VOCAB_SIZE, "mean", True, takes_adapters=True)
        self.max_step_tokens = BUDGET
        self.batches: list[list[list[int]]] = []
        self.adapters: list[list[str | None]] = []
        self.num_closed = 0
        self._clock = clock

    def compute(self, texts, second_starts, adapters):
        self.adapters.append(list(adapters))
        assert all(0 <= s <= len(t) for s, t in zip(second_starts, texts, strict=True))
        self.batches.append([text.tolist() for text in texts])
        try:
            self._clock.now_s += 1
            yield
            self._clock.now_s += 1
            if any(POISON in text for text in texts):
                raise RuntimeError("this text cannot be computed")
            vectors = np.array([[len(text), text.sum()] for text in texts], np.float32)
            vectors[[BROKEN in text for text in texts]] = np.nan
            return vectors
        except GeneratorExit:
            self.num_closed += 1
            raise


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def embedder() -> AddingEmbedder:
    return AddingEmbedder(Clock())


def make_core(embedder: AddingEmbedder, **places: int) -> EmbeddingCore:
    return EmbeddingCore(embedder, places=Places(**places), clock=embedder._clock)


@pytest.fixture
def core(embedder: AddingEmbedder) -> EmbeddingCore:
    return make_core(embedder, max_running_requests=6, max_queued_requests=2)


def run(core: EmbeddingCore) -> dict[str, list[list[float]] | str]:
    """What each request ended in: its vectors, or the message of its failure."""
    answers: dict[str, list[list[float]] | str] = {}
    for _ in range(1000):
        if not core:
            return answers
        for message in core.step(0):
            if isinstance(message, Admitted):
                continue
            assert message.request_id not in answers, "two ends of one request"
            if isinstance(message, Failed):
                answers[message.request_id] = message.message
            else:
                assert isinstance(message, Embedded)
                answers[message.request_id] = message.matrix(2).tolist()
    raise AssertionError("it does not come to an end")


def expected(texts: list[list[int]]) -> list[list[float]]:
    return [[float(len(text)), float(sum(text))] for text in texts]


def test_texts_of_all_requests_share_batches_and_come_back_in_order(core, embedder):
    requests = {f"r{i}": [[i, j] for j in range(5)] for i in range(6)}
    for name, texts in requests.items():
        core.submit(EmbedRequest.of(name, texts))
    assert run(core) == {name: expected(texts) for name, texts in requests.items()}
    assert [sum(map(len, batch)) for batch in embedder.batches] == [BUDGET] * 3 + [12]
    assert core.num_tokens == 60 and len(core) == 0


@pytest.mark.parametrize(("budget", "texts_in_batch"), [(1024, 64), (160, 40)])
def test_a_thousand_requests_for_one_text_run_in_large_batches(embedder, budget, texts_in_batch):
    """As many texts as there are slots, or as many tokens as the budget has."""
    embedder.max_step_tokens = budget
    core = make_core(embedder, max_running_requests=64, max_queued_requests=1000)
    requests = {f"r{i}": [[i % 40, 1, 2, 3]] for i in range(1000)}
    for name, texts in requests.items():
        core.submit(EmbedRequest.of(name, texts))
    assert run(core) == {name: expected(texts) for name, texts in requests.items()}
    assert core.num_batches == len(embedder.batches) == -(-1000 // texts_in_batch)


def test_a_short_request_passes_a_long_one(core, embedder):
    core.submit(EmbedRequest.of("long", [[1] * 4] * 40))
    core.step(0)
    core.submit(EmbedRequest.of("short", [[2]]))
    answers = []
    while "short" not in answers:
        answers += [message.request_id for message in core.step(0) if isinstance(message, Embedded)]
    assert answers == ["short"] and len(embedder.batches) == 2


def test_a_text_beyond_the_budget_comes_alone(core, embedder):
    core.submit(EmbedRequest.of("a", [[1], [2] * MAX_LEN, [3]]))
    assert run(core)["a"] == expected([[1], [2] * MAX_LEN, [3]])
    assert [len(batch) for batch in embedder.batches] == [1, 1, 1]


def test_who_may_kill_the_engine_runs_alone(core, embedder):
    core.submit(EmbedRequest.of("a", [[1], [1]]))
    suspect = EmbedRequest.of("suspect", [[2], [2]])
    core.submit(EmbedRequest(suspect.request_id, suspect.token_ids, suspect.lens, runs_alone=True))
    core.submit(EmbedRequest.of("b", [[3]]))
    assert set(run(core)) == {"a", "b", "suspect"}
    assert all(len({text[0] for text in batch}) == 1 for batch in embedder.batches if [2] in batch)


def test_a_failed_batch_fails_its_requests_only(core):
    core.submit(EmbedRequest.of("bad", [[POISON] * BUDGET, [1]]))
    core.submit(EmbedRequest.of("good", [[2], [3]]))
    answers = run(core)
    assert answers["good"] == expected([[2], [3]])
    assert answers["bad"] == "The engine failed while it computed this request."


def test_a_lost_device_ends_the_process_with_its_batch_on_the_board(embedder, monkeypatch):
    board = StepBoard()
    places = Places(max_running_requests=6, max_queued_requests=2)
    core = EmbeddingCore(embedder, places=places, board=board, clock=embedder._clock)
    core.submit(EmbedRequest.of("first", [[1]]))
    run(core)
    assert board.step_request_ids == []
    core.submit(EmbedRequest.of("bad", [[POISON]]))
    assert run(core) and board.step_request_ids == []

    def lose(*arguments):
        yield
        raise DeviceLost("gone")

    monkeypatch.setattr(embedder, "compute", lose)
    core.submit(EmbedRequest.of("last", [[1]]))
    with pytest.raises(DeviceLost):
        run(core)
    assert board.step_request_ids == ["last"]


def test_numbers_that_are_none_are_not_answered(core):
    core.submit(EmbedRequest.of("nan", [[BROKEN]]))
    assert run(core) == {"nan": "The model computed no usable numbers."}


def test_a_cancelled_request_ends_in_silence_and_stops_its_batch(core, embedder):
    core.submit(EmbedRequest.of("a", [[1] * BUDGET] * 3))
    core.step(0)
    core.cancel("a")
    core.cancel("unknown")
    assert embedder.num_closed == 1 and not core
    core.submit(EmbedRequest.of("b", [[2]]))
    assert run(core) == {"b": expected([[2]])}


def test_a_batch_goes_on_for_the_others(core, embedder):
    core.submit(EmbedRequest.of("a", [[1], [1]]))
    core.submit(EmbedRequest.of("b", [[2]]))
    core.step(0)
    core.cancel("a")
    assert run(core) == {"b": expected([[2]])}
    assert embedder.num_closed == 0


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (EmbedRequest("a", b"", []), "at least one token"),
        (EmbedRequest("a", b"\0" * 4, [1, 0]), "at least one token"),
        (EmbedRequest("a", b"\0" * 4, [2]), "at least one token"),
        (EmbedRequest("a", b"\0" * 3, [1]), "at least one token"),
        (EmbedRequest.of("a", [[1] * (MAX_LEN + 1)]), "has 41 tokens, but the longest .* is 40"),
        (EmbedRequest.of("a", [[1, 2]], [3]), "no such place"),
        (EmbedRequest.of("a", [[1, 2]], [-1]), "no such place"),
        (EmbedRequest.of("a", [[1, 2]], [1, 1]), "no such place"),
        (EmbedRequest.of("a", [[1, VOCAB_SIZE]]), r"outside of \[0, 50\)"),
        (EmbedRequest.of("a", [[1, -1]]), r"outside of \[0, 50\)"),
        (EmbedRequest.of("taken", [[1]]), "is in use"),
    ],
)
def test_wrong_requests_are_refused(core, request_, message):
    core.submit(EmbedRequest.of("taken", [[1]]))
    with pytest.raises(InvalidRequest, match=message):
        core.submit(request_)
    assert run(core) == {"taken": [[1.0, 1.0]]}


def test_the_queue_is_bounded_in_requests_and_in_bytes(core, monkeypatch):
    for i in range(8):
        core.submit(EmbedRequest.of(str(i), [[1]]))
    with pytest.raises(Overloaded):
        core.submit(EmbedRequest.of("one more", [[1]]))
    run(core)
    monkeypatch.setattr(embedding_queue, "MAX_WAITING_BYTES", 100)
    core.submit(EmbedRequest.of("fits", [[1]] * 8))
    with pytest.raises(Overloaded):
        core.submit(EmbedRequest.of("one more", [[1]]))
    core.cancel("fits")
    core.submit(EmbedRequest.of("fits again", [[1]] * 8))
    assert set(run(core)) == {"fits again"}


@pytest.fixture
def slots() -> AdapterSlots:
    return AdapterSlots(1)


@pytest.fixture
def with_adapters(embedder: AddingEmbedder, slots: AdapterSlots) -> EmbeddingCore:
    line = AdapterQueue(slots).line()
    places = Places(max_running_requests=6, max_queued_requests=2)
    return EmbeddingCore(embedder, places=places, clock=embedder._clock, adapters=line)


def ask(name: str, texts: list[list[int]], adapter: str | None) -> EmbedRequest:
    return EmbedRequest.of(name, texts, adapter=None if adapter is None else AdapterRef("", adapter))


def test_texts_with_different_adapters_and_with_none_share_a_batch(with_adapters, embedder, slots):
    slots.count = 2
    for name, adapter in zip("wxyz", ("a", None, "b", "a"), strict=True):
        with_adapters.submit(ask(name, [[1]], adapter))
    assert set(run(with_adapters)) == set("wxyz")
    [adapters] = embedder.adapters
    assert sorted(adapters, key=str) == [None, "a", "a", "b"] and slots.num_in_use == 0


def test_what_waits_for_an_adapter_holds_nobody_up(with_adapters, embedder, slots):
    slots.slow = {"a"}
    with_adapters.submit(ask("slow", [[1]], "a"))
    with_adapters.submit(ask("plain", [[2]], None))
    while len(with_adapters) > 1:
        with_adapters.step(0)
    assert not with_adapters.can_compute and with_adapters.step(0) == []
    slots.slow.clear()
    assert run(with_adapters) == {"slow": [[1.0, 1.0]]} and embedder.adapters == [[None], ["a"]]
    assert slots.num_in_use == 0


def test_an_adapter_that_cannot_be_had_fails_its_requests(with_adapters, slots):
    slots.broken = {"a": InvalidRequest("it is broken")}
    with_adapters.submit(ask("x", [[1]], "a"))
    with_adapters.submit(ask("y", [[1]], None))
    assert run(with_adapters) == {"x": "it is broken", "y": [[1.0, 1.0]]}
    assert slots.num_in_use == 0


def test_an_adapter_is_kept_until_none_of_its_texts_is_computed(with_adapters, slots):
    with_adapters.submit(ask("x", [[1], [2]], "a"))
    with_adapters.submit(ask("y", [[3]], None))
    with_adapters.submit(ask("waits", [[4]], "b"))
    with_adapters.step(0)
    with_adapters.cancel("x")
    assert slots.num_in_use == 1, "its texts are still in the batch"
    with_adapters.cancel("waits")
    assert run(with_adapters) == {"y": [[1.0, 3.0]]}
    assert slots.num_in_use == 0
    for text in ([POISON], [BROKEN]):
        with_adapters.submit(ask("fails", [text], "a"))
        assert isinstance(run(with_adapters)["fails"], str) and slots.num_in_use == 0


def test_adapters_are_refused_where_none_are_taken(core):
    with pytest.raises(InvalidRequest, match="takes no adapters"):
        core.submit(ask("x", [[1]], "a"))


def submit(core: EmbeddingCore, name: str, client: str, weight: float = 1.0, tokens: int = 1) -> list[str]:
    """Who had to make room for it."""
    request = EmbedRequest.of(name, [[1] * BUDGET] * tokens, client=client, weight=weight)
    answers = core.submit(request)
    assert all(isinstance(answer, Failed) and answer.slug == "queue_full" for answer in answers)
    return [answer.request_id for answer in answers]


def admissions(core: EmbeddingCore) -> list[str]:
    """Everybody, in the order in which they run."""
    admitted = []
    while core:
        admitted += [message.request_id for message in core.step(0) if isinstance(message, Admitted)]
    return admitted


def test_slots_go_round_between_clients_by_weight(embedder):
    core = make_core(embedder, max_running_requests=1, max_queued_requests=30)
    for i in range(12):
        submit(core, f"busy{i}", "busy")
    core.step(0)
    for i in range(3):
        submit(core, f"calm{i}", "calm")
    order = admissions(core)
    assert [name for name in order if "calm" in name] == ["calm0", "calm1", "calm2"]
    assert order.index("calm2") <= 6, "one of each in turn"
    for i in range(12):
        submit(core, f"heavy{i}", "heavy", weight=3)
        submit(core, f"light{i}", "light")
    assert sum("heavy" in name for name in admissions(core)[:12]) in (8, 9, 10)


def test_a_busy_client_makes_room_for_another(embedder):
    core = make_core(embedder, max_running_requests=2, max_queued_requests=4)
    for i in range(6):
        assert submit(core, f"busy{i}", "busy") == []
    core.step(0)
    with pytest.raises(Overloaded):
        submit(core, "one more", "busy")
    waiting = [job.request_id for job in core.queue.waiting]
    displaced = [submit(core, f"calm{i}", "calm") for i in range(2)]
    assert displaced == [[waiting[-1]], [waiting[-2]]], "the newest first"
    assert set(admissions(core)) >= {"calm0", "calm1"}


def test_the_tokens_of_those_that_wait_are_bounded(embedder):
    core = make_core(embedder, max_running_requests=1, max_queued_requests=9, max_queued_tokens=4 * BUDGET)
    submit(core, "runs", "a", tokens=9)
    core.step(0)
    submit(core, "waits", "a", tokens=3)
    with pytest.raises(Overloaded, match="too many tokens"):
        submit(core, "too many", "a", tokens=2)
    submit(core, "just fits", "a")
    assert set(run(core)) == {"runs", "waits", "just fits"}


def test_those_that_wait_are_cancelled_too(embedder):
    core = make_core(embedder, max_running_requests=1, max_queued_requests=2)
    for name in ("runs", "waits", "goes"):
        submit(core, name, "a")
    core.step(0)
    core.cancel("goes")
    assert [job.request_id for job in core.queue.waiting] == ["waits"]
    submit(core, "comes", "a")
    assert set(run(core)) == {"runs", "waits", "comes"}
    assert core.queue.num_running == 0 and not core


def test_generation_and_embedding_take_turns(embedder):
    """A flood of texts slows generation to no less than half, however long each step takes."""
    clock = embedder._clock

    class SlowRunner(FakeRunner):
        def execute(self, plan):
            clock.now_s += 7
            return super().execute(plan)

    settings = SchedulerSettings(
        context_length=64, vocab_size=VOCAB_SIZE, max_running_requests=4, max_queued_requests=9,
        chunked_prefill_size=16, debug_checks=True,
    )  # fmt: skip
    runner = SlowRunner(16, 16, VOCAB_SIZE)
    core = EngineCore(
        settings,
        runner,
        PlainPrefixCache(16, 16),
        embedding=make_core(embedder, max_running_requests=100, max_queued_requests=0),
        clock=clock,
    )
    for i in range(50):
        core.handle(EmbedRequest.of(str(i), [[1] * BUDGET] * 10))
    core.handle(GenerateRequest("g", b"\1\0\0\0", SamplingParams(max_tokens=30, ignore_eos=True)))
    began_s = clock.now_s
    num_tokens = 0
    while num_tokens < 30:
        for message in core.step():
            num_tokens += len(getattr(message, "token_ids", ())) if message.request_id == "g" else 0
    assert runner.num_steps == 30
    generating_s = 7 * 30
    assert 1.8 * generating_s < clock.now_s - began_s < 2.3 * generating_s
    for i in range(50):
        core.handle(CancelRequest(str(i)))
    assert not core.has_work or core.step() is not None


def test_an_engine_without_embedding_says_so():
    settings = SchedulerSettings(
        context_length=64, vocab_size=50, max_running_requests=4, max_queued_requests=9,
        chunked_prefill_size=16,
    )  # fmt: skip
    core = EngineCore(settings, FakeRunner(4, 16), PlainPrefixCache(4, 16))
    core.handle(EmbedRequest.of("a", [[1]]))
    (failed,) = core.step()
    assert isinstance(failed, Failed) and "does not embed" in failed.message
