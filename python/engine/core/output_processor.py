"""From the token chunks of one request to text: detokenizing, stop strings, finish reasons."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import msgspec

from engine.core.messages import TokenChunk, TokenLogprobs
from engine.sampling.params import SamplingParams
from engine.text.detokenizer import IncrementalDetokenizer
from engine.text.formats.events import Event
from engine.text.stop_strings import StopStrings
from engine.text.tokenizer import Tokenizer


class TextDelta(msgspec.Struct):
    """What one chunk adds to a choice.

    `tokens` are the scored tokens whose text is now given out (only if log-probabilities were
    asked for); those of a stop that is cut off never appear; `token_starts` says where in the choice's
    text each begins, in characters. `num_tokens` counts generated tokens,
    a stop token included. With a `finish_reason` the choice is complete: `matched_stop` is the
    stop string or the id of the stop token, None for "length". `token_ids` are the generated tokens,
    whether their text is given out yet or not. `prompt_logprobs` are those of the next prompt tokens,
    `logprobs` those of `token_ids`.
    """

    text: str
    tokens: Sequence[tuple[int, TokenLogprobs]]
    num_tokens: int
    finish_reason: str | None = None
    matched_stop: str | int | None = None
    token_ids: Sequence[int] = ()
    events: list[Event] | None = None
    """What the text means, where the request has calls or thoughts to be found."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    logprobs: list[TokenLogprobs] | None = None
    token_starts: Sequence[int] = ()
    tag_starts: Sequence[int] = ()
    """Where tokens of tags begin in the choice's text, as far as it is decoded."""


class OutputProcessor:
    """The text side of one request with `n` choices.

    `stops`, unused so far, saves compiling the stop strings of `params` once more for each prompt.
    `shown_ids` are special tokens that are not left out of the text, `tag_ids` those whose places are told.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        n: int,
        stops: StopStrings | None = None,
        shown_ids: frozenset[int] = frozenset(),
        tag_ids: frozenset[int] = frozenset(),
    ) -> None:
        stops = stops or StopStrings(params.stop, params.include_stop)
        self._choices = [
            _Choice(tokenizer, params, prompt_ids, stops.twin(), shown_ids, tag_ids) for _ in range(n)
        ]

    def process(self, chunk: TokenChunk) -> TextDelta | None:
        """What `chunk` adds; None if its choice is complete already.

        A delta with a finish reason where the chunk has none has met a stop string: the caller
        tells the engine to end the choice.
        """
        choice = self._choices[chunk.choice]
        return None if choice.is_complete else choice.process(chunk)


class _Choice:
    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        stops: StopStrings,
        shown_ids: frozenset[int],
        tag_ids: frozenset[int],
    ) -> None:
        self.is_complete = False
        self._keeps_stop_token = params.include_stop
        self._detokenizer = IncrementalDetokenizer.after_prompt(
            tokenizer, prompt_ids, params.skip_special_tokens, shown_ids
        )
        self._stops = stops
        self._tag_ids, self._tag_starts = tag_ids, list[int]()
        self._num_decoded = 0
        self._scored = _ScoredTokens() if params.logprobs is not None else None
        self._is_plain = not (stops.has_any or tag_ids or params.logprobs is not None)

    def process(self, chunk: TokenChunk) -> TextDelta:
        token_ids = chunk.token_ids
        if self._is_plain and len(token_ids) == 1 and chunk.finish_reason is None:  # nearly always
            text = self._detokenizer.push_one(token_ids[0])
            return TextDelta(text, (), 1, None, None, token_ids, None, chunk.prompt_logprobs, chunk.logprobs)
        is_last = chunk.finish_reason is not None
        text, num_tokens = self._push(token_ids, chunk)
        if is_last and self._stops.matched is None:
            text += self._stops.push(self._detokenizer.finish()) + self._stops.finish()
        if num_tokens < len(token_ids):
            token_ids = token_ids[:num_tokens]
        delta = TextDelta(text, (), num_tokens, token_ids=token_ids)
        if self._tag_starts:
            delta.tag_starts, self._tag_starts = self._tag_starts, []
        delta.prompt_logprobs = chunk.prompt_logprobs
        delta.logprobs = chunk.logprobs and chunk.logprobs[:num_tokens]
        if self._stops.matched is not None:
            delta.finish_reason, delta.matched_stop = "stop", self._stops.matched
        elif is_last:
            delta.finish_reason, delta.matched_stop = chunk.finish_reason, chunk.stop_token_id
        self.is_complete = delta.finish_reason is not None
        if self._scored is not None:
            delta.tokens, delta.token_starts = self._scored.release(
                len(text), is_cut=self._stops.matched is not None, is_last=is_last
            )
        return delta

    def _push(self, token_ids: Sequence[int], chunk: TokenChunk) -> tuple[str, int]:
        """The text that tokens give, and how many of them count: those behind a stop string do not."""
        num_shown = len(token_ids)
        if chunk.stop_token_id is not None and not self._keeps_stop_token:
            num_shown -= 1
        logprobs = chunk.logprobs if self._scored is not None else None
        if num_shown == 1 and logprobs is None and not self._tag_ids:
            return self._stops.push(self._detokenizer.push_one(token_ids[0])), len(token_ids)
        text = ""
        for i, token_id in enumerate(token_ids[:num_shown]):
            piece = self._detokenizer.push_one(token_id)
            if self._tag_ids:
                if token_id in self._tag_ids:
                    own = piece[self._detokenizer.num_flushed :].lstrip()
                    self._tag_starts.append(self._num_decoded + len(piece) - len(own))
                self._num_decoded += len(piece)
            if logprobs is not None:
                self._scored.add(
                    (token_id, logprobs[i]),
                    len(piece),
                    self._detokenizer.num_flushed,
                    is_whole=not self._detokenizer.num_pending,
                )
            text += self._stops.push(piece)
            if self._stops.matched is not None:
                return text, i + 1
        return text, len(token_ids)


class _ScoredTokens:
    """Scored tokens waiting for their text to be given out. Positions count characters."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[tuple[int, TokenLogprobs], int, int | None]] = deque()  # token, start, end
        self._num_decoded = 0
        self._num_given_out = 0

    def add(
        self, token: tuple[int, TokenLogprobs], num_chars: int, num_flushed: int, *, is_whole: bool
    ) -> None:
        """`num_chars` were decoded with this token, the first `num_flushed` of them from earlier ones.

        Unless `is_whole`, more of it is to come.
        """
        start = self._num_decoded + num_flushed
        self._num_decoded += num_chars
        if is_whole or num_flushed:
            ended = start if num_flushed else self._num_decoded
            self._waiting = deque((t, s, ended if e is None else e) for t, s, e in self._waiting)
        self._waiting.append((token, start, self._num_decoded if is_whole else None))

    def release(
        self, num_chars: int, *, is_cut: bool, is_last: bool
    ) -> tuple[list[tuple[int, TokenLogprobs]], list[int]]:
        """The tokens that belong to the text given out so far, `num_chars` more than before; their starts.

        `is_cut`: the text ends here; a token belongs to it if it begins in it. `is_last`: all do.
        """
        self._num_given_out += num_chars
        released, starts = [], []
        while self._waiting:
            token, start, end = self._waiting[0]
            if is_cut:
                belongs = start < self._num_given_out
            else:
                belongs = is_last or (end is not None and end <= self._num_given_out)
            if not belongs:
                break
            released.append(token)
            starts.append(start)
            self._waiting.popleft()
        return released, starts
