"""Log-probabilities in the two shapes of the API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.core.messages import TokenLogprobs
from engine.text.tokenizer import Tokenizer

ScoredToken = tuple[int, TokenLogprobs]
"""A token id with what the engine reports about its position."""


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
    """One entry a token; `bytes` are exact also where a character is spread over several tokens."""
    return {"content": [_chat_entry(tokenizer, *token) for token in tokens], "refusal": None}


def _chat_entry(tokenizer: Tokenizer, token_id: int, scores: TokenLogprobs) -> dict[str, Any]:
    alternatives = zip(scores.top_ids, scores.top_logprobs, strict=True)
    return {
        **_chat_token(tokenizer, token_id, scores.token_logprob),
        "top_logprobs": [_chat_token(tokenizer, top_id, logprob) for top_id, logprob in alternatives],
    }


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token_id),
        "bytes": list(tokenizer.token_bytes(token_id)),
        "logprob": logprob,
    }


class CompletionLogprobs:
    """The parallel lists of text completions. `num_echoed` is the length of the echoed prompt."""

    def __init__(self, tokenizer: Tokenizer, num_echoed: int) -> None:
        self._tokenizer = tokenizer
        self._num_echoed = num_echoed

    def output(self, tokens: Sequence[ScoredToken], starts: Sequence[int]) -> dict[str, Any]:
        """The entries of generated tokens; offsets count characters of the choice's text."""
        return {
            "text_offset": [self._num_echoed + start for start in starts],
            "token_logprobs": [scores.token_logprob for _, scores in tokens],
            "tokens": [self._name(token_id) for token_id, _ in tokens],
            "top_logprobs": [self._alternatives(*token) for token in tokens],
        }

    def prompt(
        self, token_ids: Sequence[int], offsets: list[int], scores: Sequence[TokenLogprobs]
    ) -> dict[str, Any]:
        """The entries of the echoed prompt. Nothing comes before its first token, which has no score."""
        scored = list(zip(token_ids[1:], scores, strict=True))
        return {
            "text_offset": offsets,
            "token_logprobs": [None, *(own.token_logprob for own in scores)],
            "tokens": [self._name(token_id) for token_id in token_ids],
            "top_logprobs": [None, *(self._alternatives(*token) for token in scored)],
        }

    def _alternatives(self, token_id: int, scores: TokenLogprobs) -> dict[str, float]:
        top = {self._name(i): logprob for i, logprob in zip(scores.top_ids, scores.top_logprobs, strict=True)}
        return top | {self._name(token_id): scores.token_logprob}

    def _name(self, token_id: int) -> str:
        """The token's text, or its bytes spelled out where they are no text on their own."""
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
