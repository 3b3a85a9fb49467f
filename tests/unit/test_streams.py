"""Streams of results on the text side."""

from __future__ import annotations

import asyncio

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

    async def run(num_streams: int) -> tuple[list[int], list[int], list[list[int]]]:
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
        async with asyncio.timeout(30):
            while not all(len(tokens) == 2 for tokens in read):  # nothing more arrives: time goes by
                await asyncio.sleep(0.01)
        await tell(3, *names)
        async with asyncio.timeout(30):
            await asyncio.gather(*followers)
        return first, second, read

    few, many = reading_pace.FEW_STREAMS, reading_pace.FEW_STREAMS + 2  # one ends early
    read = [[1, 2], *[[1, 2, 3]] * (many - 1)]
    assert asyncio.run(run(many)) == ([1] * many, [2] + [1] * (many - 1), read)
    assert asyncio.run(run(few)) == ([1] * few, [2] * few, read[:few])
