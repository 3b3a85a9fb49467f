"""What a step says of a choice: its new tokens, and the log-probabilities that were asked for."""

from __future__ import annotations

from collections.abc import Iterator

from engine.core.messages import TokenChunk, TokenLogprobs
from engine.scheduling.output_tokens import NewToken
from engine.scheduling.step_plan import StepResult, StepRow, TokenScores


def chunk_of(new: NewToken, result: StepResult, drawn: range) -> TokenChunk:
    """`drawn` are the draws that became tokens."""
    request = new.request
    wanted = request.params.logprobs
    return TokenChunk(
        request.request_id,
        request.choice,
        new.token_ids,
        None if wanted is None or new.sampled is None else [_logprobs(result, i, wanted) for i in drawn],
        request.num_cached or 0,
        new.finish_reason,
        new.stop_token_id,
    )


def was_told(new: NewToken) -> bool:
    """Whether the chunk with the last scores has said already that the answer is at its end."""
    request = new.request
    return new.sampled is None and request.params.logprobs is not None and request.num_output > 0


def scored_chunks(row: StepRow, scores: TokenScores) -> Iterator[TokenChunk]:
    """Log-probabilities of prompt tokens, and forced tokens of the output with theirs."""
    request, params = row.request, row.request.params
    num_prompt = max(0, min(row.scored.stop, request.prompt_len - 1) - row.scored.start)
    if num_prompt:
        logprobs = _known_logprobs(scores, slice(num_prompt), params.prompt_logprobs or 0)
        yield TokenChunk(
            request.request_id,
            request.choice,
            [],
            cached_tokens=request.num_cached or 0,
            prompt_logprobs=logprobs,
        )
    if num_prompt < len(row.scored):
        forced = request.token_ids[row.scored.start + num_prompt + 1 : row.scored.stop + 1]
        logprobs = _known_logprobs(scores, slice(num_prompt, None), params.logprobs or 0)
        is_last = request.finish_reason is not None and row.scored.stop == request.num_to_score
        yield TokenChunk(
            request.request_id,
            request.choice,
            forced.tolist(),
            logprobs,
            request.num_cached or 0,
            request.finish_reason if is_last else None,
            request.stop_token_id if is_last else None,
        )


def _known_logprobs(scores: TokenScores, part: slice, wanted: int) -> list[TokenLogprobs]:
    columns = (
        scores.logprobs[part].tolist(),
        scores.top_ids[part, :wanted].tolist(),
        scores.top_logprobs[part, :wanted].tolist(),
    )
    return list(map(TokenLogprobs, *columns))


def _logprobs(result: StepResult, row: int, wanted: int) -> TokenLogprobs:
    assert result.logprobs is not None, "the runner left out log-probabilities that were asked for"
    own = float(result.logprobs[row])
    if wanted == 0 or result.top_ids is None or result.top_logprobs is None:
        return TokenLogprobs(own, [], [])
    return TokenLogprobs(
        own, result.top_ids[row, :wanted].tolist(), result.top_logprobs[row, :wanted].tolist()
    )
