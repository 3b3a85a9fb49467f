"""Sampling written plainly in float64 PyTorch, one row at a time: the oracle for `ops.sampling`."""

from __future__ import annotations

import dataclasses

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Ten rounds of Philox4x32. Source: Salmon et al. 2011, figure 2."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, choice: int, position: int) -> float:
    """The random number in (0, 1) of one draw."""
    seed &= 2**64 - 1
    words = philox4x32((position & _MASK, position >> 32, choice, 0), (seed & _MASK, seed >> 32))
    return (((words[0] << 32 | words[1]) >> 11) + 0.5) * 2.0**-53


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowParams:
    """Sampling parameters of one row, with the defaults that change nothing."""

    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0
    choice: int = 0
    position: int = 0
    prompt: tuple[int, ...] = ()
    output: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed: tuple[int, ...] | None = None


RAW = RowParams()


def adjusted_logits(logits: torch.Tensor, params: RowParams) -> torch.Tensor:
    """Logits [V] float64 after penalties, bias and mask."""
    x = logits.to(torch.float64, copy=True)
    x[x.isnan()] = -torch.inf
    x.clamp_(max=torch.finfo(torch.float32).max)
    for token in set(params.prompt) | set(params.output):
        x[token] = (
            x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
        )
    for token in params.output:
        x[token] -= params.frequency_penalty
    for token in set(params.output):
        x[token] -= params.presence_penalty
    for token, bias in params.logit_bias:
        x[token] += bias
    if params.allowed is not None:
        is_ruled_out = torch.ones(len(x), dtype=torch.bool)
        is_ruled_out[list(params.allowed)] = False
        x[is_ruled_out] = -torch.inf
    return x


def weights(logits: torch.Tensor, params: RowParams) -> torch.Tensor:
    """Unnormalised probabilities [V] of the filtered distribution; all zero when nothing is allowed."""
    x = adjusted_logits(logits, params)
    w = torch.zeros_like(x)
    if torch.all(x == -torch.inf):
        return w
    order = torch.argsort(x, descending=True, stable=True)  # lower ids first among equals
    if params.temperature < 1e-6:
        w[order[0]] = 1.0
        return w
    if params.top_k > 0:
        x[order[params.top_k :]] = -torch.inf
    w = torch.exp((x - x.max()) / params.temperature)
    if params.top_p < 1:
        total = w[order].cumsum(0)
        num_kept = int(torch.searchsorted(total, params.top_p * total[-1])) + 1
        w[order[num_kept:]] = 0
    w[w < params.min_p] = 0
    return w


def processed_logits(logits: torch.Tensor, params: RowParams) -> torch.Tensor:
    """What the token is drawn from, float64 [V]: -inf where a filter dropped it."""
    x = adjusted_logits(logits, params)
    if params.temperature < 1e-6:
        return x
    if params.top_k > 0:
        x[torch.argsort(x, descending=True, stable=True)[params.top_k :]] = -torch.inf
    if params.top_p < 1 or params.min_p > 0:
        x[weights(logits, params) == 0] = -torch.inf
    return x / params.temperature


def sample_row(logits: torch.Tensor, params: RowParams) -> int:
    """The token drawn for logits [V], -1 when every token is ruled out."""
    w = weights(logits, params)
    if not w.any():
        return -1
    total = w.cumsum(0)
    threshold = uniform(params.seed, params.choice, params.position) * total[-1]
    return int(torch.searchsorted(total, threshold, right=True))


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Natural-log probabilities [V] of the raw logits, float64."""
    return logits.double().log_softmax(0)


def reported(
    logits: torch.Tensor, params: RowParams = RAW, *, processed: bool = False, as_logits: bool = False
) -> torch.Tensor:
    """The scores [V] that are reported of a row, float64."""
    chosen = processed_logits(logits, params) if processed else logits.double()
    return chosen if as_logits else chosen.log_softmax(0)
