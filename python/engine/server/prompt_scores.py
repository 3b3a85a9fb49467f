"""Prompt scores on their way to the client: held until complete, and placed in the echoed text."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from engine.core.messages import TokenLogprobs
from engine.core.output_processor import TextDelta
from engine.text.detokenizer import IncrementalDetokenizer
from engine.text.tokenizer import Tokenizer


async def after_scores(
    deltas: AsyncIterator[tuple[int, TextDelta]], num_scores: int
) -> AsyncIterator[tuple[int, TextDelta]]:
    """The deltas of one prompt, held back until all its scores are there.

    They come with the first choice only; here the first delta of every choice gets all of them. If
    the prompt is given up before it is scored, deltas have no scores.
    """
    scores: list[TokenLogprobs] = []
    held: list[tuple[int, TextDelta]] = []
    begun: set[int] = set()
    async for index, delta in deltas:
        if delta.prompt_logprobs is not None:
            scores += delta.prompt_logprobs
        else:
            held.append((index, delta))
        if len(scores) < num_scores:
            continue
        for held_index, held_delta in held:
            if held_index not in begun:
                begun.add(held_index)
                held_delta.prompt_logprobs = scores
            yield held_index, held_delta
        held.clear()
    for item in held:
        yield item


def token_offsets(tokenizer: Tokenizer, token_ids: Sequence[int], text: str) -> list[int]:
    """Where each token of a prompt begins in the prompt's text, in characters.

    A special token counts where the text spells it out; one that encoding put there has no width.
    """
    detokenizer = IncrementalDetokenizer(tokenizer)
    offsets, num_chars = [], 0
    for token_id in token_ids:
        start = num_chars
        if token_id not in tokenizer.special_ids:
            num_chars += len(detokenizer.push_one(token_id))
            start += detokenizer.num_flushed
        elif text.startswith(spelled := tokenizer.token_text(token_id), num_chars):
            num_chars += len(spelled)
        offsets.append(min(start, len(text)))
    return offsets
