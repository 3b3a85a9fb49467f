"""A decoder whose modules are transformers', on our cache, attention and products."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from engine.errors import CheckpointError
from engine.models.checkpoint import warn_of_dequantized
from engine.models.decoder import DecoderInputs
from engine.models.fallback import attention
from engine.models.fallback.skeleton import Skeleton
from engine.models.fallback.spec import TransformersSpec
from engine.models.hf_config import read_config, read_json
from engine.models.lora_sites import Site
from engine.models.quantized_config import quantized_matrices, read_quantization
from engine.models.quantized_weights import with_quantized
from engine.models.weights import FLOATS, Progress, Slot, load_checkpoint, tensor_dtypes
from engine.ops.attention_plan import LayerCache


class TransformersDecoder:
    """Has the methods of `models.decoder.Decoder`, for any model that transformers can run.

    Activations are float32, matrices are stored as `quantization` says, "none" meaning `dtype`.
    Effects: sets torch to one thread, as its elementwise functions give other bits where threads part them.
    Raises: `ConfigError` as `Skeleton`.
    """

    def __init__(
        self,
        spec: TransformersSpec,
        directory: str | Path,
        dtype: str,
        *,
        ops: ModuleType,
        ctx: Any,
        quantization: str = "none",
    ) -> None:
        torch.set_num_threads(1)
        self._spec, self._dtype = spec, dtype
        skeleton = Skeleton(directory, trusts_remote_code=spec.trusts_remote_code)
        self._weights, self._plain = skeleton.weights, skeleton.plain
        for weight in self._weights.values():
            weight.allocate(ops, ctx, dtype if quantization == "none" else quantization, dtype)
        skeleton.attention.bind(ops, ctx)
        self._attention, self._model, self._base = skeleton.attention, skeleton.model, skeleton.base
        self._own_attention = skeleton.own_attention if skeleton.writes_out else None
        self._view = skeleton.view
        parent, _, name = skeleton.base_name.rpartition(".")
        setattr(self._model.get_submodule(parent), name, _GivenStates())
        self._any_mask = torch.zeros(1, 1, 1, 1)
        """Prepared masks are taken as they are; ours needs none."""

    def slots(self) -> dict[str, Slot]:
        """Every parameter and buffer, by the name that transformers gives it."""
        slots = dict(slot for weight in self._weights.values() for slot in weight.slots())
        for name, tensor in self._plain.items():
            slots[name] = Slot(tuple(tensor.shape), tensor.copy_, dummy="ones" if "norm" in name else "zeros")
        return slots

    def lora_sites(self) -> list[Site]:
        """None, as adapters name the layers of native models: this one takes no adapters."""
        return []

    @torch.no_grad()
    def load(self, directory: str | Path, slots: dict[str, Slot], progress: Progress | None) -> None:
        """Tensor by tensor from the files where they have the names of the modules, else by way of
        transformers, which knows the names of old and of split checkpoints, and a second copy in memory.
        Matrices in few bits become floats, with a warning, and need the names of the modules.

        Raises: `CheckpointError`, one line, for what is missing, broken or does not fit.
        """
        dtypes = tensor_dtypes(directory)
        if quantizations := read_quantization(read_config(directory)):
            found = quantized_matrices(Path(directory), quantizations)
            stored = {
                name: dataclasses.replace(matrix.quantization, is_dequantized=True)
                for name, matrix in found.items()
                if not self._is_ignored(f"{name}.weight")
            }
            warn_of_dequantized(directory, stored)
            slots = with_quantized(slots, stored, dtypes)
            load_checkpoint(directory, slots, is_ignored=self._is_ignored, progress=progress)
            return
        if slots.keys() <= dtypes.keys():
            load_checkpoint(directory, slots, is_ignored=self._is_ignored, progress=progress)
            return
        for name, found in dtypes.items():
            if found not in FLOATS:
                raise CheckpointError(f"tensor {name} is {found}, expected one of {', '.join(FLOATS)}")
        model = _loaded(Path(directory), self._spec, self._dtype)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name in slots:
                slots[name].store(tensor.data)
            tensor.data = torch.empty(0)  # or there would be two models
        if progress is not None:
            progress("loading weights", 1.0)

    def forward(self, inputs: DecoderInputs, kv_layers: Sequence[LayerCache]) -> torch.Tensor:
        """What the head sees of the wanted rows, float32 [R, hidden size].

        Effects: writes the keys and values of all T tokens into `kv_layers`.
        """
        given = self._view(len(inputs.token_ids)) or {"attention_mask": self._any_mask}
        with self._attention.step(inputs.plan, inputs.slot_ids, kv_layers, inputs.positions):
            hidden = self._hidden(inputs.token_ids, inputs.positions, given)
        if inputs.num_scored or len(inputs.logit_rows) < len(hidden):
            hidden = hidden.index_select(0, inputs.logit_rows)
        return hidden

    def end_step(self) -> None:
        """Nothing is kept of a step."""

    @torch.no_grad()
    def project(self, hidden: torch.Tensor, first_row: int = 0) -> torch.Tensor:
        """Logits float32 [R, V] of rows that `forward` gave."""
        if len(hidden) == 0:
            return torch.empty(0, self._spec.vocab_size)
        return self._model(inputs_embeds=hidden[None], use_cache=False).logits[0].float().contiguous()

    def compute_alone(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Hidden states float32 [T, hidden size] of one text by transformers' own attention."""
        self._attend_by(self._own_attention or "eager")
        try:
            return self._hidden(token_ids, torch.arange(len(token_ids)), {})
        finally:
            self._attend_by(attention.WRITTEN_OUT if self._own_attention else attention.NAME)

    def _attend_by(self, name: str) -> None:
        if self._own_attention:
            self._model.config._attn_implementation = name
        else:
            self._base.set_attn_implementation(name)

    @torch.no_grad()
    def _hidden(
        self, token_ids: torch.Tensor, positions: torch.Tensor, given: Mapping[str, Any]
    ) -> torch.Tensor:
        out = self._base(
            input_ids=token_ids.long()[None], position_ids=positions.long()[None], use_cache=False, **given
        )
        return out[0][0].float()

    def _is_ignored(self, name: str) -> bool:
        """Tensors of old checkpoints that follow from the configuration, and copies of what is tied."""
        patterns = self._model._keys_to_ignore_on_load_unexpected or ()
        is_known = any(re.search(pattern, name) for pattern in patterns)
        return is_known or name in self._model.all_tied_weights_keys or name.endswith(".rotary_emb.inv_freq")


class _States:
    """What a body answers its head: hidden states, and None for all else that a head may ask for."""

    def __init__(self, states: torch.Tensor) -> None:
        self.last_hidden_state = states

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]


class _GivenStates(nn.Module):
    """A body that returns the states which it is given, for a head that wants to call one."""

    def forward(self, *_: Any, inputs_embeds: torch.Tensor, **__: Any) -> _States:
        return _States(inputs_embeds)


def _loaded(directory: Path, spec: TransformersSpec, dtype: str) -> nn.Module:
    """What transformers makes of the checkpoint, complete. Raises: `CheckpointError`."""
    facts = read_json(directory / "config.json")
    if (directory / "adapter_config.json").exists() or "transformers_weights" in facts:
        raise CheckpointError(
            "adapter_config.json and transformers_weights are not supported: files that nobody checked"
        )
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=getattr(torch, dtype),
            attn_implementation="eager",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=spec.trusts_remote_code,
            output_loading_info=True,
        )
    except Exception as error:  # anything that foreign files make foreign code do
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"transformers cannot load the checkpoint: {reason}") from None
    for what in ("missing", "unexpected", "mismatched"):
        names = sorted(map(str, info[f"{what}_keys"]))
        if names:
            raise CheckpointError(f"the checkpoint has {what} tensors: {', '.join(names[:5])}")
    return model
