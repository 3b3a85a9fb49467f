"""Deltas wait for the scores of their prompt, in order, and none is lost."""

from __future__ import annotations

import asyncio

import pytest

from engine.core.messages import TokenLogprobs
from engine.core.output_processor import TextDelta
from engine.server.prompt_scores import after_scores

SCORES = [TokenLogprobs(-i / 4, [], []) for i in range(5)]


def text(content: str, finish_reason: str | None = None) -> TextDelta:
    return TextDelta(content, [], 1, finish_reason)


def scored(first: int, end: int) -> TextDelta:
    return TextDelta("", [], 0, prompt_logprobs=SCORES[first:end])


def run(deltas: list[tuple[int, TextDelta]], num_scores: int) -> list[tuple[int, str, int | None, int]]:
    """(index, text, number of scores, how many deltas had been read by then) of what comes out."""
    num_read = 0

    async def source():
        nonlocal num_read
        for item in deltas:
            num_read += 1
            yield item

    async def collect():
        return [
            (i, d.text, None if d.prompt_logprobs is None else len(d.prompt_logprobs), num_read)
            async for i, d in after_scores(source(), num_scores)
        ]

    return asyncio.run(collect())


def test_they_wait_until_all_scores_are_there():
    deltas = [
        (0, scored(0, 3)),
        (1, text("x")),
        (1, text("y", "length")),
        (0, scored(3, 5)),
        (0, text("a")),
        (0, text("b", "length")),
    ]
    assert run(deltas, 5) == [
        (1, "x", 5, 4),
        (1, "y", None, 4),
        (0, "a", 5, 5),
        (0, "b", None, 6),
    ]


def test_a_prompt_without_anything_to_score_waits_for_nothing():
    assert run([(0, text("a")), (0, text("b", "stop"))], 0) == [(0, "a", 0, 1), (0, "b", None, 2)]


@pytest.mark.parametrize("num_scored", [0, 3])
def test_what_was_held_comes_out_when_the_prompt_is_given_up(num_scored):
    deltas = [(0, scored(0, num_scored)), (1, text("x")), (0, text("", "abort")), (1, text("", "abort"))]
    assert [item[:3] for item in run(deltas, 5)] == [(1, "x", None), (0, "", None), (1, "", None)]
