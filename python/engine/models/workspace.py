"""The memory for intermediate results of a step, allocated once and cut to each step's size."""

from __future__ import annotations

import dataclasses

import torch

from engine.models.spec import ModelSpec
from engine.ops.placement import CPU, Placement

MOST_CUTS = 256
"""That are kept; some kilobytes each."""


@dataclasses.dataclass(slots=True)
class Rows:
    """What rows carry through a layer, all of the activations' dtype.

    Shapes, for T rows of hidden size E: `residual`, `normed` and `update` [T, E], `attended`
    [T, H * D], `gate_up` [T, 2 I], `product` [T, I].
    """

    residual: torch.Tensor
    normed: torch.Tensor
    attended: torch.Tensor
    update: torch.Tensor
    gate_up: torch.Tensor
    product: torch.Tensor


@dataclasses.dataclass(slots=True)
class Heads:
    """Attention's view of the same rows: `q`, `k` and `v` are columns of `qkv`, split into heads.

    Shapes: `qkv` [T, (H + 2 G) D]; `q` and `attended` [T, H, D]; `k` and `v` [T, G, D].
    """

    qkv: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    attended: torch.Tensor


class Workspace:
    """Buffers for steps of up to `max_tokens` rows, and for the logits of `max_rows` at once.

    Steps mostly have as many rows as one of the last few, guesses now and then among them: cuts are kept.
    Cost: address space; untouched pages are never paid for.
    """

    def __init__(self, spec: ModelSpec, max_tokens: int, max_rows: int, placement: Placement = CPU) -> None:
        self._spec = spec
        hidden, heads = spec.hidden_size, spec.num_heads * spec.head_dim

        def rows(size: int) -> torch.Tensor:
            return torch.empty(max_tokens, size, dtype=placement.activations)

        self._residual, self._normed, self._update = rows(hidden), rows(hidden), rows(hidden)
        self._qkv, self._attended = rows(spec.qkv_size), rows(heads)
        self._gate_up, self._product = rows(2 * spec.dense_size), rows(spec.dense_size)
        self._kept_residual, self._kept_attended = rows(hidden), rows(heads)
        self._logits = torch.empty(max_rows, spec.vocab_size)
        self._cuts: dict[int, tuple[Rows, Heads]] = {}
        self._kept: dict[int, Rows] = {}
        self._logits_cuts: dict[int, torch.Tensor] = {}

    def cut(self, count: int) -> tuple[Rows, Heads]:
        """The first `count` rows of every buffer, and the same rows as attention sees them."""
        if count not in self._cuts:
            if len(self._cuts) == MOST_CUTS:
                self._cuts.clear()
            self._cuts[count] = self._rows(self._residual[:count], self._attended[:count]), self._heads(count)
        return self._cuts[count]

    def _heads(self, count: int) -> Heads:
        spec, qkv = self._spec, self._qkv[:count]
        q_end = spec.num_heads * spec.head_dim
        k_end = q_end + spec.num_kv_heads * spec.head_dim
        return Heads(
            qkv=qkv,
            q=qkv[:, :q_end].unflatten(1, (spec.num_heads, spec.head_dim)),
            k=qkv[:, q_end:k_end].unflatten(1, (spec.num_kv_heads, spec.head_dim)),
            v=qkv[:, k_end:].unflatten(1, (spec.num_kv_heads, spec.head_dim)),
            attended=self._attended[:count].unflatten(1, (spec.num_heads, spec.head_dim)),
        )

    def keep(self, rows: Rows, wanted: torch.Tensor) -> Rows:
        """Only the wanted rows (int64), in that order, as they stand after attention."""
        count = len(wanted)
        if count not in self._kept:
            if len(self._kept) == MOST_CUTS:
                self._kept.clear()
            self._kept[count] = self._rows(self._kept_residual[:count], self._kept_attended[:count])
        kept = self._kept[count]
        torch.index_select(rows.residual, 0, wanted, out=kept.residual)
        torch.index_select(rows.attended, 0, wanted, out=kept.attended)
        return kept

    def logits(self, count: int) -> torch.Tensor:
        """Float32 [count, V]."""
        cut = self._logits_cuts.get(count)
        if cut is None:
            if len(self._logits_cuts) == MOST_CUTS:
                self._logits_cuts.clear()
            cut = self._logits_cuts[count] = self._logits[:count]
        return cut

    def _rows(self, residual: torch.Tensor, attended: torch.Tensor) -> Rows:
        count = len(residual)
        return Rows(
            residual=residual,
            normed=self._normed[:count],
            attended=attended,
            update=self._update[:count],
            gate_up=self._gate_up[:count],
            product=self._product[:count],
        )
