"""Streams of results on the text side."""

from __future__ import annotations

import asyncio

import pytest

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

    assert asyncio.run(run()) >= 50


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
