"""Mixture of experts: each row goes through the few MLPs that a router picks for it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch

from engine.models.layers import FusedLinear, GatedLinear, NamedSlots
from engine.models.spec import ExpertsSpec, StoredFormat
from engine.models.stacked_experts import stacked_slots


class Experts:
    """Router and MLPs of one layer. Rows are grouped by expert, so that each weight is read once a step.

    A row's result does not depend on the other rows: its experts are the best of its own scores, and
    their outputs are weighted and added in the order of those scores.
    """

    def __init__(
        self,
        ops: ModuleType,
        ctx: Any,
        spec: ExpertsSpec,
        hidden_size: int,
        prefix: str,
        dtype: str,
        stored: Mapping[str, StoredFormat],
    ) -> None:
        self._ops, self._ctx, self._spec = ops, ctx, spec
        # A rounded router would send rows elsewhere; beside the experts it is small.
        exact = dtype if dtype in ("bfloat16", "float16", "float32") else "float32"
        router = [(f"{prefix}.{spec.router_name}", spec.num_experts)]
        linear = functools.partial(FusedLinear, ops, ctx, has_bias=spec.has_bias, stored=stored)
        gated = functools.partial(
            GatedLinear, ops, ctx, activation="silu", has_bias=spec.has_bias, stored=stored
        )
        self._router = linear(router, hidden_size, exact)
        self._prefix = f"{prefix}.experts"
        gate, up, down = spec.projection_names
        self._gate_up, self._down = [], []
        for expert in range(spec.num_experts):
            name, inner = f"{self._prefix}.{expert}", spec.intermediate_size
            parts = [(f"{name}.{gate}", inner), (f"{name}.{up}", inner)]
            self._gate_up.append(gated(parts, hidden_size, dtype))
            parts = [(f"{name}.{down}", hidden_size)]
            self._down.append(linear(parts, inner, dtype))

    def slots(self) -> NamedSlots:
        yield from self._router.slots()
        if self._spec.stacking != "none":
            yield from stacked_slots(self._prefix, self._gate_up, self._down, self._spec.stacking)
            return
        for part in (*self._gate_up, *self._down):
            yield from part.slots()

    def forward(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Shapes: `x`, `out` [T, hidden size], of the activations' dtype.

        Cost: a few torch calls and three ops an expert, or one op where they stay on the device.
        """
        num_rows, num_chosen = len(x), self._spec.num_chosen
        weights, expert_ids = self._route(x)
        if self.stay_on_device:
            gate_up, down = self._grouped
            self._ops.experts(self._ctx, x, weights, expert_ids, gate_up, self._gate, down, out)
            return
        # Pairs of a row and one of its experts, those of the same expert side by side.
        by_expert = expert_ids.flatten().argsort(stable=True)
        grouped = x[by_expert // num_chosen]
        counts = torch.bincount(expert_ids.flatten(), minlength=self._spec.num_experts).tolist()
        start = 0
        for expert, count in enumerate(counts):
            if count:
                self._run(expert, grouped[start : start + count])
                start += count
        results = torch.empty_like(grouped)
        results[by_expert] = grouped
        results = results.view(num_rows, num_chosen, -1).mul_(weights[:, :, None])
        out.copy_(results[:, 0])
        for rank in range(1, num_chosen):
            out.add_(results[:, rank])

    @functools.cached_property
    def stay_on_device(self) -> bool:
        """Whether one op computes all experts, so that nobody need know which rows have which; asked when the
        weights are there."""
        if not hasattr(self._ops, "experts"):
            return False
        both = [[linear.matrices for linear in linears] for linears in (self._gate_up, self._down)]
        has_one = all(len(own) == 1 for matrices in both for own in matrices)
        return has_one and all(self._ops.are_alike([m for (m,) in matrices]) for matrices in both)

    @functools.cached_property
    def _grouped(self) -> list[Any]:
        return [
            self._ops.ExpertMatrices(
                [linear.weight for linear in linears], [linear.bias for linear in linears]
            )
            for linears in (self._gate_up, self._down)
        ]

    def _gate(self, inner: torch.Tensor, product: torch.Tensor) -> None:
        if self._spec.swiglu is None:
            self._gate_up[0].join(inner, product)
        else:
            self._ops.clamped_swiglu(self._ctx, inner, *self._spec.swiglu, product)

    def _route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights float32 and ids int64 of each row's experts [T, num_chosen], best first."""
        scores = x.new_empty(len(x), self._spec.num_experts, dtype=torch.float32)
        self._router.multiply(x, scores)
        if self._spec.weighs_all:
            shares, expert_ids = scores.softmax(-1).topk(self._spec.num_chosen)
            return shares, expert_ids
        best, expert_ids = scores.topk(self._spec.num_chosen)
        return best.softmax(-1), expert_ids

    def _run(self, expert: int, rows: torch.Tensor) -> None:
        """Replace rows by what the expert makes of them."""
        gate_up, down = self._gate_up[expert], self._down[expert]
        inner = rows.new_empty(len(rows), gate_up.out_features)
        product = rows.new_empty(len(rows), self._spec.intermediate_size)
        if self._spec.swiglu is None:
            gate_up.multiply_gated(rows, inner, product)
        else:
            gate_up.multiply(rows, inner)
            self._gate(inner, product)
        down.multiply(product, rows)
