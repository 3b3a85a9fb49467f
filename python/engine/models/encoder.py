"""The encoder that all families share: attention to all tokens of a text, no padding, no cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterable
from types import ModuleType
from typing import Any

import torch

from engine.models.encoder_layers import EncoderLayer, LayerNorm, Table
from engine.models.encoder_spec import EncoderSpec
from engine.models.layers import FusedLinear, GatedLinear
from engine.models.rope import device_rope_tables
from engine.models.spec import RopeSpec
from engine.models.weights import Slot
from engine.ops.attention_plan import AttentionPlan
from engine.ops.placement import CPU, Placement

BLOCK_SIZE = 16
"""Tokens in a block of the keys and values of one layer, which the next layer writes over."""


@dataclasses.dataclass(slots=True)
class EncoderInputs:
    """T tokens of B texts, one after the other.

    Shapes: `token_ids`, `positions` int32 [T]; `position_rows` int32 [T], where in the table of learned
    positions each token's is, as `position_rows` has it; `slot_ids` int64 [T], the place of each token's keys
    and values, each text beginning with a block; `type_ids` int32 [T], or None: all 0.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    position_rows: torch.Tensor
    slot_ids: torch.Tensor
    plan: AttentionPlan
    type_ids: torch.Tensor | None = None


class Encoder:
    """Weights and workspace of one model, for steps of up to `max_tokens` tokens in `max_blocks` blocks. One
    for a GPU is made `with placement.making():`.

    Cost: on the CPU workspaces are address space; untouched pages are never paid for.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        dtype: str,
        *,
        ops: ModuleType,
        ctx: Any,
        max_tokens: int,
        max_blocks: int,
        placement: Placement = CPU,
    ) -> None:
        self._spec, self._ops, self._ctx = spec, ops, ctx
        names, hidden = spec.names, spec.hidden_size
        self._words = Table(names.words, spec.vocab_size, hidden, dtype)
        self._positions = self._types = None
        if names.positions is not None:
            num_positions = spec.first_position + spec.max_len
            self._positions = Table(names.positions, num_positions, hidden, dtype)
        if names.types is not None:
            self._types = Table(names.types, spec.num_types, hidden, dtype)
        self._embedding_norm = LayerNorm(names.embedding_norm, hidden, has_bias=spec.has_norm_bias)
        self.layers = [EncoderLayer(ops, ctx, spec, index, dtype) for index in range(spec.num_layers)]
        self._final_norm = None
        if names.final_norm is not None:
            self._final_norm = LayerNorm(names.final_norm, hidden, has_bias=spec.has_norm_bias)
        self._rope = {
            theta: device_rope_tables(_rope_spec(spec, theta), spec.max_len, placement.device)
            for theta in set(spec.rope_thetas)
        }
        inner = spec.intermediate_size

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=placement.activations)

        self._hidden, self._normed, self._attended, self._update = (
            empty(max_tokens, hidden) for _ in range(4)
        )
        self._qkv = empty(max_tokens, 3 * hidden)
        self._up = empty(max_tokens, (2 if spec.is_gated else 1) * inner)
        self._product = empty(max_tokens, inner) if spec.is_gated else self._up
        block = spec.head_dim, BLOCK_SIZE
        self._values = empty(max_blocks, spec.num_heads, *reversed(block))
        self._keys = empty(max_blocks, spec.num_heads, *block) if placement.has_transposed_keys else None
        if self._keys is None:
            self._keys = torch.empty_like(self._values)

    def slots(self) -> dict[str, Slot]:
        """Every checkpoint tensor that this model needs, by its name without prefix."""
        parts = [self._words, self._positions, self._types, self._embedding_norm, *self.layers]
        parts.append(self._final_norm)
        return dict(slot for part in parts if part is not None for slot in part.slots())

    def forward(self, inputs: EncoderInputs) -> Generator[None, None, torch.Tensor]:
        """Hidden states after the last layer, [T, hidden size] of `placement.activations`, valid until the
        next call.

        Yields between two layers.
        """
        count = len(inputs.token_ids)
        hidden = self._hidden[:count]
        self._embed(inputs, hidden)
        is_pre_norm = self._spec.is_pre_norm
        normed = hidden
        if is_pre_norm:  # the first layer has no norm of its own
            normed = self._normed[:count].copy_(hidden)
        for index, layer in enumerate(self.layers):
            if index > 0:
                yield
            self._attend(layer, normed, inputs, index)
            update = self._linear(self._attended[:count], layer.output, self._update)
            # A pre-norm layer keeps the sum and norms a copy, a post-norm layer norms the sum itself.
            self._add_norm(update, hidden, layer.mlp_norm if is_pre_norm else layer.attention_norm, normed)
            update = self._linear(self._activate(layer, normed), layer.down, self._update)
            self._add_norm(update, hidden, self._norm_after(index) if is_pre_norm else layer.mlp_norm, normed)
        return normed

    def _embed(self, inputs: EncoderInputs, out: torch.Tensor) -> None:
        rows = self._words.weight.index_select(0, inputs.token_ids).float()  # sums are not rounded
        if self._positions is not None:
            rows += self._positions.weight.index_select(0, inputs.position_rows)
        if self._types is not None:
            if inputs.type_ids is None:
                rows += self._types.weight[0]
            else:
                rows += self._types.weight.index_select(0, inputs.type_ids)
        self._norm(rows, self._embedding_norm, out)

    def _norm_after(self, index: int) -> LayerNorm | None:
        is_last = index + 1 == len(self.layers)
        return self._final_norm if is_last else self.layers[index + 1].attention_norm

    def _attend(self, layer: EncoderLayer, x: torch.Tensor, inputs: EncoderInputs, index: int) -> None:
        """From normed rows to attended rows."""
        ops, ctx, spec = self._ops, self._ctx, self._spec
        qkv = self._linear(x, layer.qkv, self._qkv)
        q, k, v = qkv.unflatten(1, (3, spec.num_heads, spec.head_dim)).unbind(1)
        caches = self._keys, self._values
        if spec.rope_thetas:
            turn = *self._rope[spec.rope_thetas[index]], inputs.positions
            ops.rope_append_kv(ctx, q, k, v, *turn, *caches, inputs.slot_ids)
        else:
            ops.append_kv(ctx, k, v, *caches, inputs.slot_ids)
        attended = self._attended[: len(x)].unflatten(1, (spec.num_heads, spec.head_dim))
        scale = spec.head_dim**-0.5
        ops.paged_attention(ctx, q, *caches, inputs.plan, scale, layer.window, 0.0, attended)

    def _activate(self, layer: EncoderLayer, x: torch.Tensor) -> torch.Tensor:
        if isinstance(layer.up, GatedLinear):
            product = self._product[: len(x)]
            layer.up.multiply_gated(x, self._up[: len(x)], product)
            return product
        up = self._linear(x, layer.up, self._up)
        self._ops.activate(self._ctx, up, self._spec.activation, up)
        return up

    def _linear(self, x: torch.Tensor, layer: FusedLinear, buffer: torch.Tensor) -> torch.Tensor:
        out = buffer[: len(x)]
        self._ops.linear(self._ctx, x, layer.weight, layer.bias, out)
        return out

    def _norm(self, x: torch.Tensor, norm: LayerNorm, out: torch.Tensor) -> None:
        self._ops.layer_norm(self._ctx, x, None, norm.weight, norm.bias, self._spec.norm_eps, out)

    def _add_norm(
        self, update: torch.Tensor, residual: torch.Tensor, norm: LayerNorm | None, out: torch.Tensor
    ) -> None:
        assert norm is not None
        eps = self._spec.norm_eps
        self._ops.layer_norm(self._ctx, update, residual, norm.weight, norm.bias, eps, out)


def position_rows(token_ids: torch.Tensor, positions: torch.Tensor, first: int) -> torch.Tensor:
    """Rows of the table of positions, int32 [T], for tokens of packed texts, of which each begins with row
    `first`. A padding token, which a text may well hold, has the row before that and moves no other: models
    that leave a row to padding were trained so. Shapes: `token_ids`, `positions` int32 [T], on the host."""
    is_padding = token_ids == first - 1
    if first > 0 and bool(is_padding.any()):
        num_so_far = is_padding.cumsum(0)
        begins = torch.arange(len(positions)) - positions
        in_text = num_so_far - (num_so_far - is_padding.long())[begins]
        positions = torch.where(is_padding, -1, positions - in_text).int()
    return positions + first


def _rope_spec(spec: EncoderSpec, theta: float) -> RopeSpec:
    return RopeSpec(kind="default", theta=theta, rotary_dim=spec.head_dim)


def named_as_in(slots: dict[str, Slot], names: Iterable[str], prefix: str) -> dict[str, Slot]:
    """The same slots under the names that a checkpoint has: with or without its prefix, and norms in the
    old spelling."""
    known = set(names)
    found = {}
    for name, slot in slots.items():
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        candidates = (name, prefix + name, old, prefix + old)
        found[next((c for c in candidates if c in known), name)] = slot
    return found
