"""The answers of POST /generate: text, token ids and `meta_info` of each choice, as SGLang writes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from engine.core.messages import TokenLogprobs
from engine.core.output_processor import TextDelta
from engine.server.answer import Answer, Shape
from engine.server.generate_schema import NativeRequest
from engine.server.generation import Generation
from engine.server.sse import Events, encode_json
from engine.text.tokenizer import Tokenizer

Entry = tuple[float | None, int, str | None]
"""Score, token id, and its text if that is asked for."""


class NativeAnswer(Answer):
    """Not wrapped: one object for a single prompt, else an array."""

    def _content(self, generation: Generation, choices: list[dict[str, Any]]) -> Any:
        assert isinstance(self.shape, NativeShape)
        return choices[0] if self.shape.is_single else choices


@dataclasses.dataclass
class _Choice:
    """What a choice has so far."""

    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    scores: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    num_tokens: int = 0


class NativeShape(Shape):
    """Implements `Shape`; `generation` must be set before anything is written."""

    object_name = stream_object_name = ""
    generation: Generation

    def __init__(
        self,
        tokenizer: Tokenizer,
        asked: NativeRequest,
        prompts: Sequence[tuple[list[int], Any]],
        names: Sequence[str],
    ) -> None:
        self._tokenizer, self._asked, self._prompts, self._names = tokenizer, asked, prompts, names
        self._n = asked.parts[0].n
        self.is_single = asked.is_single and self._n == 1
        self.fields: dict[str, Any] = {}
        self._choices = [_Choice() for _ in range(len(prompts) * self._n)]
        self._inputs: dict[int, dict[str, Any]] = {}

    def opening(self, events: Events) -> Iterable[bytes]:
        return ()

    def events(self, events: Events, index: int, delta: TextDelta, **extra: Any) -> Iterable[bytes]:
        if not delta.token_ids and delta.finish_reason is None:
            return
        if self._asked.is_incremental:
            shown = self._choices[index] = _Choice(num_tokens=self._choices[index].num_tokens)
        else:
            shown = self._choices[index]
        result = self._result(index, shown, delta)
        if not self.is_single:
            result["index"] = index
        yield b"data: " + encode_json(result) + b"\n\n"

    def choice(self, index: int, deltas: list[TextDelta]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for delta in deltas:
            result = self._result(index, self._choices[index], delta)
        return result

    def _result(self, index: int, choice: _Choice, delta: TextDelta) -> dict[str, Any]:
        """Add a delta to a choice; what the choice is then."""
        choice.text += delta.text
        choice.token_ids += delta.token_ids
        choice.scores += delta.logprobs or ()
        choice.num_tokens += delta.num_tokens
        prompt = index // self._n
        meta_info = {
            "id": self._names[prompt],
            "finish_reason": _finish_reason(delta, choice.num_tokens),
            "prompt_tokens": len(self._prompts[prompt][0]),
            "completion_tokens": choice.num_tokens,
            "cached_tokens": self.generation.cached_tokens_of[prompt],
            "weight_version": "default",
            "seed": self.generation.seeds[prompt],
        }
        if delta.finish_reason is not None:
            meta_info["e2e_latency"] = self.generation.timings["total_ms"] / 1000
        self._add_scores(meta_info, prompt, choice, delta)
        return {"text": choice.text, "output_ids": choice.token_ids, "meta_info": meta_info}

    def _add_scores(self, meta_info: dict[str, Any], prompt: int, choice: _Choice, delta: TextDelta) -> None:
        params = self._prompts[prompt][1]
        if params.logprobs is None:
            return
        meta_info |= self._input_scores(prompt, delta)
        scored = list(zip(choice.token_ids, choice.scores, strict=False))
        meta_info["output_token_logprobs"] = [self._own(*token) for token in scored]
        if params.logprobs:
            meta_info["output_top_logprobs"] = [self._top(scores) for _, scores in scored]

    def _input_scores(self, prompt: int, delta: TextDelta) -> dict[str, Any]:
        """Those of the prompt, made when they come, which is with the first delta."""
        start = self._asked.logprob_starts[prompt]
        ids, params = self._prompts[prompt]
        if prompt not in self._inputs:
            entries: list[Entry] = []
            tops: list[list[Entry] | None] = []
            if start is not None and delta.prompt_logprobs is not None:
                if start == 0:  # nothing comes before the first token, which has no score
                    entries, tops = [(None, ids[0], self._text(ids[0]))], [None]
                scored = zip(ids[max(1, start) :], delta.prompt_logprobs, strict=True)
                entries += [self._own(*token) for token in scored]
                tops += [self._top(scores) for scores in delta.prompt_logprobs]
            made: dict[str, Any] = {"input_token_logprobs": entries}
            if params.logprobs:
                made["input_top_logprobs"] = tops
            self._inputs[prompt] = made
        return self._inputs[prompt]

    def _own(self, token_id: int, scores: TokenLogprobs) -> Entry:
        return scores.token_logprob, token_id, self._text(token_id)

    def _top(self, scores: TokenLogprobs) -> list[Entry]:
        pairs = zip(scores.top_logprobs, scores.top_ids, strict=True)
        return [(logprob, token_id, self._text(token_id)) for logprob, token_id in pairs]

    def _text(self, token_id: int) -> str | None:
        return self._tokenizer.token_text(token_id) if self._asked.has_text_in_logprobs else None


def _finish_reason(delta: TextDelta, num_tokens: int) -> dict[str, Any] | None:
    match delta.finish_reason:
        case None:
            return None
        case "stop":
            return {"type": "stop", "matched": delta.matched_stop}
        case "length":
            return {"type": "length", "length": num_tokens}
        case other:
            return {"type": other, "message": "Aborted"}
