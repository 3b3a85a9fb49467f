"""Drawing one token a row, in one native call for the whole batch."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from engine import _native

if TYPE_CHECKING:
    from engine._native import ExecutionContext

Tensor = Any


@dataclasses.dataclass(slots=True)
class SamplingTensors:
    """Arguments of `sample`: torch tensors or numpy arrays, R rows, V vocabulary.

    Scratch: `logits` float32 [R, V] (NaN becomes -inf in place, +inf the largest float; changed
    where `reports_processed`), `workspace` float32 [R, V], `seen` int32 [R, ceil(V/32)].
    Per row [R]: `temperature` float32 (below 1e-6: the most likely token), `top_k` int32 (0 or
    less: off), `top_p` float32 (1: off), `min_p` float32 (0: off), the three penalties float32
    (repetition 1: off, others 0: off), `seeds` int64, `choices` int32, `positions` int64 (output
    position of the token to draw).
    Ragged: `token_ids` int32 [M] are the known tokens of all rows one after the other, row r's
    being [token_indptr[r], token_indptr[r+1]), the first `prompt_lens[r]` of them its prompt; a
    row without penalties may be empty. `bias_ids` int32 and `bias_values` float32 are ragged in
    the same way by `bias_indptr`; -inf rules a token out. `token_indptr`, `bias_indptr` int64 [R+1].
    `bitmask` int32 [R, ceil(V/32)] or None: bit i%32 of word i/32 allows token i.
    Results: `out_ids` int32 [R], -1 where every token is ruled out; `num_top_logprobs` int32 [R],
    -1 for none, says where `out_logprobs` float32 [R] and the first entries of `top_ids` int32 and
    `top_logprobs` float32 [R, K] are written. They are of the raw logits, or with `reports_processed`
    of what the token is drawn from; natural-log probabilities, or with `reports_logits` logits.
    """

    logits: Tensor
    workspace: Tensor
    seen: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    frequency_penalty: Tensor
    presence_penalty: Tensor
    seeds: Tensor
    choices: Tensor
    positions: Tensor
    token_ids: Tensor
    token_indptr: Tensor
    prompt_lens: Tensor
    bias_ids: Tensor
    bias_values: Tensor
    bias_indptr: Tensor
    bitmask: Tensor | None
    num_top_logprobs: Tensor
    out_ids: Tensor
    out_logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor
    reports_processed: bool = False
    reports_logits: bool = False


def sample(ctx: ExecutionContext, tensors: SamplingTensors) -> None:
    """Draw one token for each row.

    Order: repetition penalty (prompt and output), frequency and presence penalties (output), logit
    bias, bitmask; then, unless greedy, top-k, temperature, top-p of what is left, min-p relative to
    the likeliest token. The token is where `u * total` falls when the weights are laid out by
    token id; ties in a filter go to the lower id.

    Random numbers: `u` is Philox4x32-10 of (seed, choice, position), 53 bits, so a draw does not
    depend on the batch. Log-probabilities are natural logarithms of the softmax of the raw logits,
    unless others are asked for: processed logits are those after all of the above, -inf where a
    filter dropped the token; greedy rows have no temperature and no filters.

    Cost: a few passes over the row; top-k and top-p need three more each, and no sorting.
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011); Holtzman et al.,
    "The curious case of neural text degeneration" (2019); Keskar et al., "CTRL" (2019).
    """
    _native.sample(
        ctx,
        logits=tensors.logits,
        workspace=tensors.workspace,
        seen=tensors.seen,
        temperature=tensors.temperature,
        top_k=tensors.top_k,
        top_p=tensors.top_p,
        min_p=tensors.min_p,
        repetition_penalty=tensors.repetition_penalty,
        frequency_penalty=tensors.frequency_penalty,
        presence_penalty=tensors.presence_penalty,
        seeds=tensors.seeds,
        choices=tensors.choices,
        positions=tensors.positions,
        token_ids=tensors.token_ids,
        token_indptr=tensors.token_indptr,
        prompt_lens=tensors.prompt_lens,
        bias_ids=tensors.bias_ids,
        bias_values=tensors.bias_values,
        bias_indptr=tensors.bias_indptr,
        bitmask=tensors.bitmask,
        num_top_logprobs=tensors.num_top_logprobs,
        out_ids=tensors.out_ids,
        out_logprobs=tensors.out_logprobs,
        top_ids=tensors.top_ids,
        top_logprobs=tensors.top_logprobs,
        reports_processed=tensors.reports_processed,
        reports_logits=tensors.reports_logits,
    )


def score_tokens(
    ctx: ExecutionContext,
    logits: Tensor,
    token_ids: Tensor,
    num_top_logprobs: Tensor,
    out_logprobs: Tensor,
    top_ids: Tensor,
    top_logprobs: Tensor,
    reports_logits: bool = False,
) -> None:
    """Log-probabilities of tokens that are known already: the same numbers that `sample` reports
    of raw logits.

    Shapes: `logits` float32 [R, V] (NaN becomes -inf in place, +inf the largest float), `token_ids`
    int32 [R], `num_top_logprobs` int32 [R], `out_logprobs` float32 [R], `top_ids` int32 and
    `top_logprobs` float32 [R, K], of which row r's first `num_top_logprobs[r]` are written, best first.
    """
    _native.score_tokens(
        ctx, logits, token_ids, num_top_logprobs, out_logprobs, top_ids, top_logprobs, reports_logits
    )
