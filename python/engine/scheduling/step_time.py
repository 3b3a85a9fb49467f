"""Predicts how long a step takes, so that prefill does not make the decoding requests wait."""

from __future__ import annotations

_DECAY = 0.9


class StepTimeModel:
    """step time = time of a decode-only step + prefill tokens * time per prefill token.

    Both are averages over recent steps, the second weighted by tokens so that small chunks, which
    measure overhead, count little. A single stall is forgotten after a few dozen steps. Only the
    split of work between steps depends on it, never a number in an answer.
    """

    def __init__(self) -> None:
        self.decode_step_s = 0.0
        self._prefill_s = 0.0
        self._prefill_tokens = 0.0

    def observe(self, num_prefill_tokens: int, elapsed_s: float) -> None:
        """Learn from one step."""
        if num_prefill_tokens == 0:
            before = self.decode_step_s or elapsed_s
            self.decode_step_s = _DECAY * before + (1 - _DECAY) * elapsed_s
            return
        own_s = max(elapsed_s - self.decode_step_s, 0.0)
        self._prefill_s = _DECAY * self._prefill_s + own_s
        self._prefill_tokens = _DECAY * self._prefill_tokens + num_prefill_tokens

    def prefill_tokens_within(self, target_s: float, most: int) -> int:
        """How many prefill tokens fit a step of `target_s` that decodes too; at most `most`."""
        left_s = target_s - self.decode_step_s
        if left_s <= 0:
            return 0
        if self._prefill_s * most <= left_s * self._prefill_tokens or self._prefill_tokens == 0:
            return most
        return int(left_s * self._prefill_tokens / self._prefill_s)
