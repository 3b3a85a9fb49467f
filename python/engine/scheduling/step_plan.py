"""What one step computes, and what comes back: the seam between the scheduler and the runner."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    from engine.scheduling.request import Request


@dataclasses.dataclass(slots=True)
class StepRow:
    """One request's share of a step: positions [start, start + num_tokens) of its known tokens.

    `samples` says that the last of them is the last known token, so that a new token is drawn; `forced`
    that it is, but that the constraint leaves no choice of the next one, so that none is drawn.
    `scored` are positions of the row whose next token, known already, is to be scored.

    A row that samples may go on with `num_drafts` guesses of what comes next, which lie behind the
    known tokens: one more token is drawn behind each of them. `num_accepted` of them turned out right.

    A row `is_ahead` when its one token is what the step before draws for the request: only the device
    knows it when the row is launched. It `is_overtaken` when a constraint turned out to force what comes
    behind that token: then nothing comes of the row.
    """

    request: Request
    start: int
    num_tokens: int
    samples: bool
    scored: range = range(0)
    num_drafts: int = 0
    num_accepted: int = 0
    forced: bool = False
    is_ahead: bool = False
    is_overtaken: bool = False

    @property
    def num_draws(self) -> int:
        return 1 + self.num_drafts if self.samples else 0

    @property
    def drafts(self) -> np.ndarray:
        """The guessed token ids, int32 [num_drafts]."""
        end = self.start + self.num_tokens
        return self.request.token_ids[end - self.num_drafts : end]

    def cut_drafts(self, count: int) -> None:
        """Keep only the first `count` drafts."""
        self.num_tokens -= self.num_drafts - count
        self.num_drafts = count


class Draw(NamedTuple):
    """A token to be drawn for `request`, whose first `num_known` tokens are behind it."""

    request: Request
    num_known: int


@dataclasses.dataclass(slots=True)
class StepPlan:
    """The rows of one step; at most one row a request, decode rows and prefill chunks mixed."""

    rows: list[StepRow]
    bitmask: np.ndarray | None = None
    """int32 [R, ceil(V / 32)], tokens that the R draws may give; None: all of them."""

    num_prefill: int = 0
    """Tokens of prompts and drafts among them."""
    began_s: float = 0.0
    """When it was planned."""

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)

    @property
    def has_late_masks(self) -> bool:
        """Whether what a constraint allows here follows from a token that only the device knows."""
        return any(row.is_ahead and row.samples and row.request.matcher is not None for row in self.rows)

    @property
    def sampled_rows(self) -> list[StepRow]:
        return [row for row in self.rows if row.samples]

    @property
    def growing_rows(self) -> list[StepRow]:
        """Those that get a new token, drawn or forced."""
        return [row for row in self.rows if row.samples or row.forced]

    @property
    def draws(self) -> list[Draw]:
        """What is drawn, in order: one token a sampled row, and one behind each of its drafts."""
        draws = []
        for row in self.sampled_rows:
            end = row.start + row.num_tokens
            if row.num_drafts:
                draws += [Draw(row.request, known) for known in range(end - row.num_drafts, end)]
            draws.append(Draw(row.request, end))
        return draws

    def accept(self, token_ids: np.ndarray) -> None:
        """Compare the drafts with what was drawn, int32 [R]: those before the first wrong one are right.

        A draft is not accepted either when nothing can be drawn behind it, so that the next step finds that.
        """
        first = 0
        for row in self.sampled_rows:
            if row.num_drafts:
                drawn = token_ids[first : first + row.num_drafts + 1]
                is_right = (drawn[:-1] == row.drafts) & (drawn[1:] >= 0)
                row.num_accepted = row.num_drafts if is_right.all() else int(is_right.argmin())
            first += 1 + row.num_drafts

    @property
    def scored_rows(self) -> list[StepRow]:
        return [row for row in self.rows if row.scored]


@dataclasses.dataclass(slots=True)
class TokenScores:
    """Log-probabilities of known tokens: those after the C scored positions of a row.

    Shapes: `logprobs` float32 [C]; `top_ids` int32 and `top_logprobs` float32 [C, K], best first,
    K being what the request asked for, or the vocabulary if that is less. Natural logarithms of the
    softmax of the raw logits, or what --logprobs-mode says.
    """

    logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


@dataclasses.dataclass(slots=True)
class StepResult:
    """Results of the plan's R draws, in its order.

    Shapes: `token_ids` int32 [R]; `logprobs` float32 [R], of the sampled tokens; `top_ids` int32
    and `top_logprobs` float32 [R, K], best first, K being the most that any row asked for. The
    last three are None when no row asked for log-probabilities. Natural logarithms, taken from
    the logits before bias, penalties and temperature, or what --logprobs-mode says. `scores`
    has one entry for each of the plan's scored rows.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray | None = None
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None
    scores: Sequence[TokenScores] = ()


Wait = Callable[[], StepResult]
"""Waits for a step, and for none that was launched later."""


class Runner(Protocol):
    """Runs the model for one step. Implemented by `runner.model_runner`, and by fakes in tests."""

    def launch(self, plan: StepPlan, before_draws: Callable[[], None] | None = None) -> Wait:
        """Start a step; what it gives. Steps are computed in the order in which they are launched.

        What the plan and its requests hold is read before this returns. On a GPU that is before the step
        is computed, and waiting is what takes long; on the CPU all is done by then. `before_draws` is called
        when the model is launched and the drawing is not: there the plan may still get its bitmask.
        """
        ...
