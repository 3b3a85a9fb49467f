"""What the text of one choice means: thoughts, content and calls, found as the deltas arrive."""

from __future__ import annotations

from engine.core.output_processor import TextDelta
from engine.text.formats.events import CallEnd, Event, Reasoning
from engine.text.formats.output import OutputFormat, OutputParser
from engine.text.formats.reader import Stage
from engine.text.tokenizer import Tokenizer


class ChoiceReader:
    """Adds events to the deltas of one choice."""

    def __init__(self, output_format: OutputFormat, tokenizer: Tokenizer) -> None:
        self._parser = OutputParser(output_format)
        self._tokens = output_format.thought_tokens(tokenizer)
        self._streams_thoughts = output_format.streams_thoughts
        self._thoughts: list[Event] = []
        self._has_calls = False
        self._num_undecided = 0
        self.counts_by_text = self._tokens is None and output_format.thoughts is not None
        """Whether tokens of thoughts are told by the text they give: all of a delta are of one kind then."""

    def read(self, delta: TextDelta) -> int:
        """Set what the delta means; returns how many more tokens turn out to be thoughts.

        Effects: a choice that ends by itself after a call gets the finish reason "tool_calls".
        """
        stage = self._parser.stage
        events = self._parser.push(delta.text, delta.tag_starts)
        num_thoughts = self._count(stage, delta)
        if delta.finish_reason is not None:
            events += self._parser.finish(is_cut=delta.finish_reason in ("length", "abort"))
        self._has_calls |= any(isinstance(event, CallEnd) for event in events)
        if delta.finish_reason == "stop" and self._has_calls:
            delta.finish_reason = "tool_calls"
        if not self._streams_thoughts:
            events = self._with_whole_thoughts(events, is_last=delta.finish_reason is not None)
        delta.events = events
        return num_thoughts

    def _count(self, before: Stage, delta: TextDelta) -> int:
        """What marks the thoughts belongs to them. Told by the text alone, so do the tokens before."""
        if self._tokens is not None:
            num_before = self._tokens.num_thoughts
            for token_id in delta.token_ids:
                self._tokens.see(token_id)
            return self._tokens.num_thoughts - num_before
        after, num_tokens = self._parser.stage, delta.num_tokens
        if Stage.THINKING not in (before, after) and not (
            before is Stage.UNDECIDED and self._parser.has_thought
        ):
            if after is Stage.UNDECIDED:
                self._num_undecided += num_tokens
            return 0
        num_tokens += self._num_undecided
        self._num_undecided = 0
        return num_tokens

    def _with_whole_thoughts(self, events: list[Event], *, is_last: bool) -> list[Event]:
        self._thoughts += [event for event in events if isinstance(event, Reasoning)]
        others = [event for event in events if not isinstance(event, Reasoning)]
        if not self._thoughts or not (others or is_last):
            return others
        whole = Reasoning("".join(event.text for event in self._thoughts))
        self._thoughts.clear()
        return [whole, *others]
