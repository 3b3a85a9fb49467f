"""Decode steps on the CPU without an interpreter between their ops: recorded once, replayed natively."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine._native import Recording
from engine.models.decoder import DecoderInputs
from engine.ops.attention_plan import LayerCache

MOST_RECORDINGS = 48
"""That are kept, some 100 kilobytes each; the one that was not used for longest makes room."""

Forward = Callable[[DecoderInputs, Sequence[LayerCache]], torch.Tensor]


class _Recorded(NamedTuple):
    recording: Recording
    hidden: torch.Tensor
    inputs: DecoderInputs
    """Those of the step that was recorded, whose memory a replay reads."""
    asked_for: DecoderInputs
    """What `run` was called with then, of which they were made."""


class DecodeReplay:
    """Runs a model's `forward`; steps with one token a row, and those that draw behind each of their tokens
    as decoding with guesses does, by replaying the first one with as many rows and tokens.

    A replay calls the same ops on the same memory, so its bits are those of the step op by op. It needs
    inputs that lie where they lay (see `BatchInputs`), which is checked, and a model whose `forward` only
    calls native ops: where torch computes something, nothing is recorded from then on.
    """

    def __init__(self, forward: Forward, kv_layers: Sequence[LayerCache], context: Any) -> None:
        self._forward, self._kv_layers, self._context = forward, kv_layers, context
        self._recorded: OrderedDict[tuple[int, int], _Recorded] = OrderedDict()
        self._can_record = hasattr(context, "begin_recording")

    def run(self, inputs: DecoderInputs) -> torch.Tensor:
        """The model's hidden rows, valid until the next call."""
        num_rows, num_tokens = inputs.plan.kv_lens.shape[0], inputs.token_ids.shape[0]
        num_wanted = inputs.logit_rows.shape[0]
        is_decode = num_tokens in (num_wanted, num_rows) and not inputs.num_scored
        if not self._can_record or not is_decode or inputs.adapters:
            return self._forward(inputs, self._kv_layers)
        hidden = self._all_rows((num_rows, num_tokens), inputs)
        # Behind a token that a constraint forces nothing is drawn; its row is computed with the others.
        return hidden if num_wanted == num_tokens else hidden.index_select(0, inputs.logit_rows)

    def _all_rows(self, shape: tuple[int, int], inputs: DecoderInputs) -> torch.Tensor:
        recorded = self._recorded.get(shape)
        is_same = recorded is not None and (
            recorded.asked_for is inputs or _addresses(recorded.inputs) == _addresses(inputs)
        )
        if not is_same:
            return self._record(shape, inputs)
        self._recorded.move_to_end(shape)
        recorded.recording.replay()
        return recorded.hidden

    def _record(self, shape: tuple[int, int], asked_for: DecoderInputs) -> torch.Tensor:
        recording, watch = Recording(), _TorchWatch()
        inputs = dataclasses.replace(asked_for, logit_rows=torch.arange(shape[1]))
        self._context.begin_recording(recording)
        try:
            with watch:
                hidden = self._forward(inputs, self._kv_layers)
        finally:
            self._context.end_recording()
        if watch.has_computed:
            self._can_record = False
            return hidden
        self._recorded[shape] = _Recorded(recording, hidden, inputs, asked_for)
        if len(self._recorded) > MOST_RECORDINGS:
            self._recorded.popitem(last=False)
        return hidden


def _addresses(inputs: DecoderInputs) -> list[int]:
    plan = inputs.plan
    tensors = (inputs.token_ids, inputs.positions, inputs.slot_ids)
    return [t.data_ptr() for t in (*tensors, plan.cu_seqlens_q, plan.kv_lens, plan.block_tables)]


class _TorchWatch(TorchDispatchMode):
    """Sees whether torch does anything but cut tensors."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """To keep its compiler out of this mode, torch would import it: a second of the first step."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.has_computed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.has_computed |= not func.is_view
        return func(*args, **(kwargs or {}))
