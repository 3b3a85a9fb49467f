"""Streams of results on the text side."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from engine.core import reading_pace
from engine.core.messages import GenerateRequest, TokenChunk
from engine.core.streams import StreamTable, TokenStream
from engine.errors import Overloaded
from engine.sampling.params import SamplingParams


def test_a_reader_that_catches_up_lets_others_run() -> None:
    async def run() -> int:
        stream = TokenStream(GenerateRequest("a", b"", SamplingParams()))
        for token_id in range(100):
            stream.push(TokenChunk("a", 0, [token_id], finish_reason="length" if token_id == 99 else None))
        num_turns = 0

        async def count_turns() -> None:
            nonlocal num_turns
            while True:
                num_turns += 1
                await asyncio.sleep(0)

        other = asyncio.create_task(count_turns())
        assert [chunk.token_ids[0] async for chunk in stream] == list(range(100))
        other.cancel()
        return num_turns

    assert asyncio.run(run()) >= 12  # a turn for eight chunks


def test_a_reader_that_falls_behind_is_given_up() -> None:
    async def run() -> None:
        table = StreamTable()
        stream = table.open(GenerateRequest("a", b"", SamplingParams()))
        stream.max_unread = 3
        assert [table.dispatch([TokenChunk("a", 0, [i])]) for i in range(3)] == [[]] * 3
        assert table.dispatch([TokenChunk("a", 0, [3])]) == [stream]
        assert stream.is_overrun and len(table) == 0
        read = []
        with pytest.raises(Overloaded) as caught:
            async for chunk in stream:
                read += chunk.token_ids
        assert (read, caught.value.slug) == ([0, 1, 2, 3], "slow_reader")

    asyncio.run(run())


def test_readers_of_many_streams_rest_between_two_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_pace, "LOOKS_A_SECOND", 1)
    monkeypatch.setattr(reading_pace, "LONGEST_PAUSE_S", 0.5)
    now_s = 100.0

    def make_loop() -> asyncio.AbstractEventLoop:
        """Its time goes by when it is told to, however slow the machine is."""
        loop = asyncio.new_event_loop()
        loop.time = lambda: now_s
        return loop

    async def run(num_streams: int) -> tuple[list[int], list[int], list[list[int]]]:
        nonlocal now_s
        table, names = StreamTable(), [str(i) for i in range(num_streams)]
        read: list[list[int]] = [[] for _ in names]

        async def follow(stream: TokenStream, into: list[int]) -> None:
            async for chunk in stream:
                into += chunk.token_ids

        async def tell(token_id: int, *ending: str) -> list[int]:
            table.dispatch(
                [
                    TokenChunk(name, 0, [token_id], finish_reason="stop" if name in ending else None)
                    for name in names
                ]
            )
            for _ in range(20):
                await asyncio.sleep(0)
            return [len(tokens) for tokens in read]

        streams = [table.open(GenerateRequest(name, b"", SamplingParams())) for name in names]
        followers = [asyncio.create_task(follow(*pair)) for pair in zip(streams, read, strict=True)]
        await asyncio.sleep(0)
        first, second = await tell(1), await tell(2, names[0])
        for _ in range(100):  # nothing more arrives: time goes by
            now_s += 0.01
            await asyncio.sleep(0)
        await tell(3, *names)
        assert all(follower.done() for follower in followers)
        return first, second, read

    def run_in_its_time(num_streams: int) -> tuple[list[int], list[int], list[list[int]]]:
        with asyncio.Runner(loop_factory=make_loop) as runner:
            return runner.run(run(num_streams))

    few, many = reading_pace.FEW_STREAMS, reading_pace.FEW_STREAMS + 2  # one ends early
    read = [[1, 2], *[[1, 2, 3]] * (many - 1)]
    assert run_in_its_time(many) == ([1] * many, [2] + [1] * (many - 1), read)
    assert run_in_its_time(few) == ([1] * few, [2] * few, read[:few])


class Clock:
    """What `ReadingPace` needs of an event loop, with time that passes when it is told to."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self._timers: list[tuple[float, Callable[..., None], tuple[object, ...]]] = []

    def time(self) -> float:
        return self.now_s

    def call_at(self, when_s: float, function: Callable[..., None], *args: object) -> None:
        self._timers.append((when_s, function, args))

    def pass_until(self, end_s: float) -> None:
        while due := [timer for timer in self._timers if timer[0] <= end_s]:
            timer = min(due)
            self._timers.remove(timer)
            self.now_s = max(self.now_s, timer[0])
            timer[1](*timer[2])
        self.now_s = end_s


class Reader:
    def __init__(self, last_woken_s: float) -> None:
        self.last_woken_s = last_woken_s
        self.num_looks = 0

    def wake(self) -> None:
        self.num_looks += 1


def test_nobody_is_woken_because_another_has_rested(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, pace = Clock(), reading_pace.ReadingPace()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: clock)
    early, late = Reader(100 - 0.010), Reader(100)
    pace.chunks_arrived([early, late], 32)
    clock.pass_until(100.005)
    assert (early.num_looks, late.num_looks) == (0, 0)
    clock.pass_until(100.010)
    assert (early.num_looks, late.num_looks) == (1, 0)
    pace.chunks_arrived([early], 32)
    clock.pass_until(100.020)
    assert (early.num_looks, late.num_looks) == (1, 1), "within a quarter of the pause"
    clock.pass_until(101)
    assert (early.num_looks, late.num_looks) == (2, 1)


def test_a_step_wakes_who_has_rested_and_has_something_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, pace = Clock(), reading_pace.ReadingPace()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: clock)
    resting, reading, idle = Reader(100), Reader(100), Reader(0)
    pace.chunks_arrived([resting], 32)
    clock.now_s = 100.017
    pace.chunks_arrived([reading], 32)
    assert [reader.num_looks for reader in (resting, reading, idle)] == [1, 1, 0]
