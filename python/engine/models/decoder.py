"""The decoder that all families share: attention on a paged KV cache and gated MLP."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from engine.models.adapter_rows import AdapterRows
from engine.models.checkpoint import load_weights
from engine.models.decoder_layer import DecoderLayer, Mlp
from engine.models.layers import FusedLinear, Norm
from engine.models.lora_sites import EMBEDDING, Site
from engine.models.rope import device_rope_tables
from engine.models.spec import ModelSpec
from engine.models.weights import Progress, Slot
from engine.models.workspace import Heads, Rows, Workspace
from engine.ops.attention_plan import AttentionPlan, LayerCache
from engine.ops.placement import CPU, Placement


@dataclasses.dataclass(slots=True)
class DecoderInputs:
    """What one step feeds the decoder: T tokens of B sequences, R of them wanted as logits.

    Shapes: `token_ids`, `positions` int32 [T]; `slot_ids` int64 [T], where each token's keys and
    values go; `logit_rows` int64 [R], indices into T, each once. The last `num_scored` of them score
    prompt tokens, the others draw new ones; both parts ascend. `host_logit_rows` are the same where those lie
    on another device. `adapters` are those of the step, and
    `adapter_of_token` int [T] has an index into them, or -1 for the base model.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_ids: torch.Tensor
    logit_rows: torch.Tensor
    plan: AttentionPlan
    num_scored: int = 0
    adapters: Sequence[Any] = ()
    adapter_of_token: np.ndarray | None = None
    host_logit_rows: np.ndarray | None = None


class Decoder:
    """Weights, position tables and workspace of one model; `forward` allocates nothing per layer.

    `ops` is `engine.ops.native`, or in tests `engine.ops.reference`; `ctx` is its execution context.
    `max_tokens` bounds T of a step, `num_positions` every position, `max_rows` the rows that are
    projected to logits at once, `max_lora_rank` the rank of an adapter's modules. Matrices are stored as
    `quantization` says, "none" meaning `dtype`. A model for a GPU is made `with
    placement.making():`.
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
        max_lora_rank: int = 0,
        quantization: str = "none",
        placement: Placement = CPU,
    ) -> None:
        self._spec, self._ops, self._ctx = spec, ops, ctx
        stored = dtype if quantization == "none" else quantization
        self._layers = [DecoderLayer(ops, ctx, spec, index, stored) for index in range(spec.num_layers)]
        self._final_norm = Norm("model.norm", spec.hidden_size, spec.norm_offset)
        self._next_norms = [*(layer.input_norm for layer in self._layers[1:]), self._final_norm]
        embedding = [("model.embed_tokens", spec.vocab_size)]
        size, in_few_bits = spec.hidden_size, spec.stored
        self._embedding = FusedLinear(ops, ctx, embedding, size, stored, stored=in_few_bits)
        self._head = self._embedding
        if not spec.tie_word_embeddings:
            head = [("lm_head", spec.vocab_size)]
            self._head = FusedLinear(ops, ctx, head, size, stored, stored=in_few_bits)
        self._rope_tables = {
            rope: device_rope_tables(rope, num_positions, placement.device)
            for rope in set(spec.ropes)
            if rope
        }
        # Rounded as the embeddings are, which is how such models were trained.
        self._embedding_scale = torch.tensor(spec.embedding_scale, dtype=getattr(torch, dtype)).item()
        self._workspace = Workspace(spec, max_tokens, max_rows, placement)
        self._adaptable = [self._embedding]
        for layer in self._layers:
            self._adaptable += [layer.qkv, layer.output, *(layer.mlp if isinstance(layer.mlp, Mlp) else ())]
        for site, linear in enumerate(self._adaptable):
            linear.site = site
        self._wanted_adapters: AdapterRows | None = None
        most_parts = max(len(linear.lora_site.parts) for linear in self._adaptable)
        self._lora_workspace = torch.empty(max(max_tokens, max_rows) * most_parts * max_lora_rank)

    def slots(self) -> dict[str, Slot]:
        """Every checkpoint tensor that this model needs, by name."""
        parts = [self._embedding, *self._layers, self._final_norm]
        if self._head is not self._embedding:
            parts.append(self._head)
        return dict(slot for part in parts for slot in part.slots())

    def lora_sites(self) -> list[Site]:
        """Where adapters can add, by number, in the order in which a step meets them."""
        spec = self._spec
        embedding = Site.of(spec.vocab_size, [("model.embed_tokens", spec.hidden_size)])
        head = Site.of(spec.hidden_size, [("lm_head", spec.vocab_size)])
        return [embedding, *(linear.lora_site for linear in self._adaptable[1:]), head]

    def is_ignored(self, name: str) -> bool:
        """Whether a left-over tensor is known to be harmless.

        Old checkpoints store the rotary frequencies, which follow from the configuration, and some
        store a copy of a tied embedding as the head.
        """
        return name.endswith(".rotary_emb.inv_freq") or (
            self._spec.tie_word_embeddings and name == "lm_head.weight"
        )

    def load(self, directory: str | Path, slots: dict[str, Slot], progress: Progress | None) -> None:
        """Fill the slots from the files of a checkpoint. Raises: `CheckpointError`."""
        load_weights(directory, self._spec, slots, is_ignored=self.is_ignored, progress=progress)

    @property
    def waits_for_device(self) -> bool:
        """Whether a step asks a GPU what it computed, so that no graph can be captured of it."""
        return any(not isinstance(m := layer.mlp, Mlp) and not m.stay_on_device for layer in self._layers)

    def forward(self, inputs: DecoderInputs, kv_layers: Sequence[LayerCache]) -> torch.Tensor:
        """What the head sees of the wanted rows [R, hidden size], valid until the next call.

        Effects: writes the keys and values of all T tokens into `kv_layers`.
        """
        num_tokens, wanted = len(inputs.token_ids), inputs.logit_rows
        rows, heads = self._workspace.cut(num_tokens)
        adapters = None
        if inputs.adapter_of_token is not None:
            adapters = AdapterRows(self._ops, inputs.adapters, inputs.adapter_of_token)
        self._embed(inputs.token_ids, rows.residual, adapters)
        if self._embedding_scale != 1:
            rows.residual.mul_(self._embedding_scale)
        self._norm(rows.residual, self._layers[0].input_norm, rows.normed)
        for layer, next_norm, kv in zip(self._layers, self._next_norms, kv_layers, strict=True):
            self._attend(layer, rows, heads, kv, inputs, adapters)
            if layer is self._layers[-1] and (inputs.num_scored or len(wanted) < num_tokens):
                rows = self._workspace.keep(rows, wanted)  # nobody looks at the others again
                adapters = None if adapters is None else adapters.select(_on_host(inputs))
            if rows.residual.shape[0] > 0:
                self._finish_layer(layer, rows, next_norm, adapters)
        self._wanted_adapters = adapters
        return rows.normed

    def end_step(self) -> None:
        """Let go of the adapters of the last `forward`; nothing more is projected of it."""
        self._wanted_adapters = None

    def project(self, hidden: torch.Tensor, first_row: int = 0) -> torch.Tensor:
        """Logits float32 [R, V] of up to `max_rows` rows that `forward` gave, from `first_row` on; valid
        until the next call."""
        num_rows = hidden.shape[0]
        logits = self._workspace.logits(num_rows)
        if num_rows > 0:
            self._linear(hidden, self._head, logits)
            if self._wanted_adapters is not None:
                adapters = self._wanted_adapters.select(slice(first_row, first_row + num_rows))
                self._add_lora(hidden, len(self._adaptable), logits, adapters)
        if self._spec.logit_divisor != 1:
            logits.div_(self._spec.logit_divisor)
        if self._spec.logit_softcap > 0:
            self._ops.softcap(self._ctx, logits, self._spec.logit_softcap)
        return logits

    def _embed(self, token_ids: torch.Tensor, out: torch.Tensor, adapters: AdapterRows | None) -> None:
        self._ops.embedding(self._ctx, token_ids, self._embedding.weight, out)
        if adapters is not None:
            workspace = self._lora_workspace
            self._ops.lora_embedding(self._ctx, token_ids, EMBEDDING, adapters.plan, workspace, out)

    def _attend(
        self,
        layer: DecoderLayer,
        rows: Rows,
        heads: Heads,
        kv: LayerCache,
        inputs: DecoderInputs,
        adapters: AdapterRows | None,
    ) -> None:
        """From normed rows to attended rows."""
        ops, ctx, spec = self._ops, self._ctx, self._spec
        self._linear(rows.normed, layer.qkv, heads.qkv, adapters)
        if spec.qk_norm != "none":
            for x, norm in ((heads.q, layer.q_norm), (heads.k, layer.k_norm)):
                x = x.flatten(1) if spec.qk_norm == "row" else x
                self._norm(x, norm, x)
        caches = kv.keys, kv.values
        if layer.rope is not None:
            turn = *self._rope_tables[layer.rope], inputs.positions
            ops.rope_append_kv(ctx, heads.q, heads.k, heads.v, *turn, *caches, inputs.slot_ids, kv.scales)
        else:
            ops.append_kv(ctx, heads.k, heads.v, *caches, inputs.slot_ids, kv.scales)
        numbers = spec.attention_scale, layer.window, spec.attention_softcap
        sinks = layer.sinks.scores if layer.sinks else None
        ops.paged_attention(ctx, heads.q, *caches, inputs.plan, *numbers, heads.attended, sinks, kv.scales)

    def _finish_layer(
        self, layer: DecoderLayer, rows: Rows, next_norm: Norm | None, adapters: AdapterRows | None
    ) -> None:
        """From attended rows to the rows that the next layer, or the head, starts from."""
        self._linear(rows.attended, layer.output, rows.update, adapters)
        self._add_update(rows, layer.attention_norm, layer.mlp_norm)
        if isinstance(layer.mlp, Mlp):
            gate_up, down = layer.mlp
            if adapters is None:
                gate_up.multiply_both(rows.normed, rows.gate_up, rows.product, down, rows.update)
            else:
                self._linear(rows.normed, gate_up, rows.gate_up, adapters)
                gate_up.join(rows.gate_up, rows.product)
                self._linear(rows.product, down, rows.update, adapters)
        else:
            layer.mlp.forward(rows.normed, rows.update)
        self._add_update(rows, layer.update_norm, next_norm)

    def _add_update(self, rows: Rows, update_norm: Norm | None, next_norm: Norm | None) -> None:
        """Add the update to the residual stream, and normalise that for what comes next."""
        if update_norm is not None:
            self._norm(rows.update, update_norm, rows.update)
        if self._spec.residual_scale != 1:
            rows.update.mul_(self._spec.residual_scale)
        if next_norm is not None:
            eps = self._spec.rms_norm_eps
            self._ops.add_rms_norm(self._ctx, rows.update, rows.residual, next_norm.weight, eps, rows.normed)
        else:
            rows.normed.copy_(rows.residual.add_(rows.update))

    def _linear(
        self, x: torch.Tensor, layer: FusedLinear, out: torch.Tensor, adapters: AdapterRows | None = None
    ) -> None:
        layer.multiply(x, out)
        if adapters is not None:
            self._add_lora(x, layer.site, out, adapters)

    def _add_lora(self, x: torch.Tensor, site: int, out: torch.Tensor, adapters: AdapterRows) -> None:
        self._ops.lora(self._ctx, x, site, adapters.plan, self._lora_workspace, out)

    def _norm(self, x: torch.Tensor, norm: Norm | None, out: torch.Tensor) -> None:
        """Without a norm, a copy."""
        if norm is None:
            out.copy_(x)
        else:
            self._ops.rms_norm(self._ctx, x, norm.weight, self._spec.rms_norm_eps, out)


def _on_host(inputs: DecoderInputs) -> np.ndarray:
    return inputs.logit_rows.numpy() if inputs.host_logit_rows is None else inputs.host_logit_rows
