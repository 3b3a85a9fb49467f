"""The decoder that all families share: pre-norm attention and gated MLP on a paged KV cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from engine.models.layers import DecoderLayer, FusedLinear, Norm
from engine.models.rope import rope_tables
from engine.models.spec import ModelSpec
from engine.models.weights import Slot
from engine.ops.attention_plan import AttentionPlan


@dataclasses.dataclass(slots=True)
class DecoderInputs:
    """What one step feeds the decoder: T tokens of B sequences, R of them wanted as logits.

    Shapes: `token_ids`, `positions` int32 [T]; `slot_ids` int64 [T], where each token's keys and
    values go; `logit_rows` int64 [R], indices into T.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_ids: torch.Tensor
    logit_rows: torch.Tensor
    plan: AttentionPlan


class Decoder:
    """Weights, position tables and workspace of one model; `forward` allocates nothing per layer.

    `ops` is `engine.ops.native`, or in tests `engine.ops.reference`; `ctx` is its execution context.
    `max_tokens` and `max_rows` bound T and R of a step, `num_positions` every position.
    """

    def __init__(
        self,
        spec: ModelSpec,
        dtype: str,
        *,
        ops: ModuleType,
        ctx: Any,
        max_tokens: int,
        max_rows: int,
        num_positions: int,
    ) -> None:
        self._spec, self._ops, self._ctx = spec, ops, ctx
        self._layers = [DecoderLayer(ops, ctx, spec, index, dtype) for index in range(spec.num_layers)]
        self._final_norm = Norm("model.norm", spec.hidden_size)
        embedding = [("model.embed_tokens", spec.vocab_size)]
        self._embedding = FusedLinear(ops, ctx, embedding, spec.hidden_size, dtype)
        self._head = self._embedding
        if not spec.tie_word_embeddings:
            self._head = FusedLinear(ops, ctx, [("lm_head", spec.vocab_size)], spec.hidden_size, dtype)
        self._multiply = ops.silu_mul if spec.activation == "silu" else ops.gelu_mul
        self._cos, self._sin = rope_tables(spec.rope, num_positions)
        self._workspace = _Workspace(spec, max_tokens, max_rows)

    def slots(self) -> dict[str, Slot]:
        """Every checkpoint tensor that this model needs, by name."""
        parts = [self._embedding, *self._layers, self._final_norm]
        if self._head is not self._embedding:
            parts.append(self._head)
        return dict(slot for part in parts for slot in part.slots())

    def is_ignored(self, name: str) -> bool:
        """Whether a left-over tensor is known to be harmless.

        Old checkpoints store the rotary frequencies, which follow from the configuration, and some
        store a copy of a tied embedding as the head.
        """
        return name.endswith(".rotary_emb.inv_freq") or (
            self._spec.tie_word_embeddings and name == "lm_head.weight"
        )

    def forward(
        self, inputs: DecoderInputs, kv_layers: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> torch.Tensor:
        """Logits float32 [R, V] of the wanted rows, valid until the next call.

        Effects: writes the keys and values of all T tokens into `kv_layers` (key and value cache
        of each layer).
        """
        ops, ctx, eps = self._ops, self._ctx, self._spec.rms_norm_eps
        step = self._workspace.views(len(inputs.token_ids), len(inputs.logit_rows))
        ops.embedding(ctx, inputs.token_ids, self._embedding.weight, step.residual)
        for index, (layer, kv) in enumerate(zip(self._layers, kv_layers, strict=True)):
            if index == 0:
                ops.rms_norm(ctx, step.residual, layer.input_norm.weight, eps, step.normed)
            else:
                self._add_norm(step.update, step.residual, layer.input_norm, step.normed)
            self._attention(layer, step, kv, inputs)
            self._add_norm(step.update, step.residual, layer.mlp_norm, step.normed)
            self._mlp(layer, step)
        return self._logits(step, inputs.logit_rows)

    def _attention(
        self,
        layer: DecoderLayer,
        step: _StepViews,
        kv: tuple[torch.Tensor, torch.Tensor],
        inputs: DecoderInputs,
    ) -> None:
        ops, ctx, spec = self._ops, self._ctx, self._spec
        self._linear(step.normed, layer.qkv, step.qkv)
        if layer.q_norm is not None and layer.k_norm is not None:
            ops.rms_norm(ctx, step.q, layer.q_norm.weight, spec.rms_norm_eps, step.q)
            ops.rms_norm(ctx, step.k, layer.k_norm.weight, spec.rms_norm_eps, step.k)
        ops.rope(ctx, step.q, step.k, self._cos, self._sin, inputs.positions)
        ops.append_kv(ctx, step.k, step.v, *kv, inputs.slot_ids)
        ops.paged_attention(
            ctx, step.q, *kv, inputs.plan, spec.head_dim**-0.5, layer.window, 0.0, step.attended_heads
        )
        self._linear(step.attended, layer.output, step.update)

    def _mlp(self, layer: DecoderLayer, step: _StepViews) -> None:
        self._linear(step.normed, layer.gate_up, step.gate_up)
        self._multiply(self._ctx, step.gate_up, step.product)
        self._linear(step.product, layer.down, step.update)

    def _logits(self, step: _StepViews, rows: torch.Tensor) -> torch.Tensor:
        if len(rows):
            torch.index_select(step.residual, 0, rows, out=step.last_residual)
            torch.index_select(step.update, 0, rows, out=step.last_update)
            self._add_norm(step.last_update, step.last_residual, self._final_norm, step.last_normed)
            self._linear(step.last_normed, self._head, step.logits)
        return step.logits

    def _linear(self, x: torch.Tensor, layer: FusedLinear, out: torch.Tensor) -> None:
        self._ops.linear(self._ctx, x, layer.weight, layer.bias, out)

    def _add_norm(self, x: torch.Tensor, residual: torch.Tensor, norm: Norm, out: torch.Tensor) -> None:
        self._ops.add_rms_norm(self._ctx, x, residual, norm.weight, self._spec.rms_norm_eps, out)


@dataclasses.dataclass(slots=True)
class _StepViews:
    """The workspace cut to one step. q, k, v are the columns of `qkv`; heads are split off."""

    residual: torch.Tensor
    update: torch.Tensor
    normed: torch.Tensor
    qkv: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    attended: torch.Tensor
    attended_heads: torch.Tensor
    gate_up: torch.Tensor
    product: torch.Tensor
    last_residual: torch.Tensor
    last_update: torch.Tensor
    last_normed: torch.Tensor
    logits: torch.Tensor


class _Workspace:
    """All intermediate results, allocated once for the largest step; untouched pages cost nothing."""

    def __init__(self, spec: ModelSpec, max_tokens: int, max_rows: int) -> None:
        self._spec = spec
        hidden, heads = spec.hidden_size, spec.num_heads * spec.head_dim
        self._hidden = [torch.empty(max_tokens, hidden) for _ in range(3)]
        self._last_hidden = [torch.empty(max_rows, hidden) for _ in range(3)]
        self._qkv = torch.empty(max_tokens, spec.qkv_size)
        self._attended = torch.empty(max_tokens, heads)
        self._gate_up = torch.empty(max_tokens, 2 * spec.intermediate_size)
        self._product = torch.empty(max_tokens, spec.intermediate_size)
        self._logits = torch.empty(max_rows, spec.vocab_size)

    def views(self, num_tokens: int, num_rows: int) -> _StepViews:
        spec = self._spec
        q_end = spec.num_heads * spec.head_dim
        k_end = q_end + spec.num_kv_heads * spec.head_dim
        residual, update, normed = (buffer[:num_tokens] for buffer in self._hidden)
        last_residual, last_update, last_normed = (buffer[:num_rows] for buffer in self._last_hidden)
        qkv, attended = self._qkv[:num_tokens], self._attended[:num_tokens]
        return _StepViews(
            residual=residual,
            update=update,
            normed=normed,
            qkv=qkv,
            q=qkv[:, :q_end].unflatten(1, (spec.num_heads, spec.head_dim)),
            k=qkv[:, q_end:k_end].unflatten(1, (spec.num_kv_heads, spec.head_dim)),
            v=qkv[:, k_end:].unflatten(1, (spec.num_kv_heads, spec.head_dim)),
            attended=attended,
            attended_heads=attended.unflatten(1, (spec.num_heads, spec.head_dim)),
            gate_up=self._gate_up[:num_tokens],
            product=self._product[:num_tokens],
            last_residual=last_residual,
            last_update=last_update,
            last_normed=last_normed,
            logits=self._logits[:num_rows],
        )
