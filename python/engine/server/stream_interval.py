"""Fewer and larger events: deltas of a stream put together until they hold enough tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator

from engine.core.output_processor import TextDelta


async def in_intervals(
    deltas: AsyncIterator[tuple[int, TextDelta]], interval: int
) -> AsyncIterator[tuple[int, TextDelta]]:
    """The same, with at least `interval` tokens each but for the first and the last of each choice."""
    begun: set[int] = set()
    held: dict[int, TextDelta] = {}
    try:
        async for index, delta in deltas:
            if (earlier := held.pop(index, None)) is not None:
                delta = _joined(earlier, delta)
            if index in begun and delta.num_tokens < interval and delta.finish_reason is None:
                held[index] = delta
            else:
                begun.add(index)
                yield index, delta
    except Exception:
        for item in held.items():  # what there was is given out before the error
            yield item
        raise


def _joined(first: TextDelta, second: TextDelta) -> TextDelta:
    return TextDelta(
        first.text + second.text,
        [*first.tokens, *second.tokens],
        first.num_tokens + second.num_tokens,
        second.finish_reason,
        second.matched_stop,
        [*first.token_ids, *second.token_ids],
        events=None if first.events is None or second.events is None else first.events + second.events,
        token_starts=[*first.token_starts, *second.token_starts],
        logprobs=None if first.logprobs is None else [*first.logprobs, *(second.logprobs or ())],
    )
