"""Our paged attention under the modules of transformers, through its attention registry.

The registry calls functions, which find the model's own `PagedAttention` on the module that calls; masks have
a registry too, in which ours says what a mask is instead of making one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from engine.errors import ConfigError
from engine.models.fallback.spec import AttentionLayer
from engine.ops.attention_plan import AttentionPlan, LayerCache

NAME = "engine_paged"
_UNDERSTOOD = ("scaling", "softcap", "s_aux", "is_causal", "sliding_window")
_HARMLESS = (
    "dropout", "position_ids", "cache_position", "position_embeddings", "logits_to_keep",
)  # fmt: skip
Layers = Mapping[int, AttentionLayer]
KVLayers = Sequence[LayerCache]


class PagedAttention:
    """The attention of one model. In a dry run it learns what `layers` there are; between `step`'s begin and
    end it computes."""

    def __init__(self) -> None:
        self.layers: dict[int, AttentionLayer] = {}
        self._places: dict[int, int] = {}
        self._ops: ModuleType | None = None
        self._step: tuple[AttentionPlan, torch.Tensor, KVLayers] | None = None

    def bind(self, ops: ModuleType, ctx: Any) -> None:
        """From now on compute with these."""
        self._ops, self._ctx = ops, ctx
        self._places = {layer: place for place, layer in enumerate(sorted(self.layers))}

    @contextlib.contextmanager
    def step(self, plan: AttentionPlan, slot_ids: torch.Tensor, kv_layers: KVLayers) -> Iterator[None]:
        """Tokens of several sequences, one after the other, as `DecoderInputs` has them."""
        self._step = plan, slot_ids, kv_layers
        try:
            yield
        finally:
            self._step = None

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        settings: Mapping[str, Any],
    ) -> torch.Tensor:
        """Shapes: `query` [1, H, T, D], `key` [1, G, T, D], `value` [1, G, T, V]; the result [1, T, H, V]."""
        if self._step is None or self._ops is None:
            self._learn(module, key, value, mask, settings)
            return torch.zeros(1, query.shape[2], query.shape[1], value.shape[3])
        plan, slot_ids, kv_layers = self._step
        layer = self.layers[module.layer_idx]
        caches = kv_layers[self._places[module.layer_idx]]
        keys, values, scales = (None if part is None else part[:, : layer.num_kv_heads] for part in caches)
        dim = keys.shape[2]
        q, k, v = (_rows(x, dim) for x in (query, key, value))
        self._ops.append_kv(self._ctx, k, v, keys, values, slot_ids, scales)
        out = torch.empty_like(q)
        scale = settings.get("scaling")
        scale = query.shape[3] ** -0.5 if scale is None else float(scale)
        softcap, sinks = settings.get("softcap") or 0.0, settings.get("s_aux")
        if sinks is not None:
            sinks = sinks.detach().float().contiguous()
        numbers = scale, layer.window, float(softcap)
        self._ops.paged_attention(self._ctx, q, keys, values, plan, *numbers, out, sinks, scales)
        return out[None, :, :, : layer.value_dim]

    def _learn(
        self,
        module: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        settings: Mapping[str, Any],
    ) -> None:
        """Raises: `ConfigError` for what our attention does not do."""
        kind, index = type(module).__name__, getattr(module, "layer_idx", None)
        if not isinstance(index, int) or index in self.layers:
            raise ConfigError(f"{kind} does not have keys and values of its own in each layer")
        for name, setting in settings.items():
            is_off = setting is None or setting is False
            if not is_off and name not in _UNDERSTOOD and name not in _HARMLESS:
                raise ConfigError(f"{kind} gives attention {name}, which is not supported")
        if settings.get("is_causal") is False:
            raise ConfigError(f"{kind} sees later tokens, which a decoder cannot")
        window = settings.get("sliding_window") or 0
        if mask is not None:
            if mask.dtype != torch.int64 or mask.numel() != 1:
                raise ConfigError(f"{kind} has a mask of its own, which is not supported")
            window = int(mask)
        self.layers[index] = AttentionLayer(key.shape[1], key.shape[3], value.shape[3], window)


def register() -> None:
    """Make attention and masks of ours known to transformers under `NAME`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _window_of)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    return module.engine_attention.attend(module, query, key, value, attention_mask, settings), None


def _window_of(*, mask_function: Callable[..., torch.Tensor], config: Any, **_: Any) -> torch.Tensor:
    """What a mask is, int64 [1, 1, 1, 1]: the tokens that a query sees, itself included; 0: all before it.

    Asked for real positions, as far apart as the model's context has them.
    Raises: `ConfigError` when it is neither.
    """
    count = getattr(config, "max_position_embeddings", None) or 4096
    keys, zero = torch.arange(count), torch.tensor(0)

    def seen(queries: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(mask_function(zero, zero, queries[:, None], keys[None, :]))

    window = int(seen(keys[-1:]).sum())
    asked = {0, 1, 2, count // 3, count // 2, count - 2, window - 1, window, window + 1, 2 * window}
    queries = torch.tensor(sorted(q for q in asked if 0 <= q < count))
    expected = (keys <= queries[:, None]) & (keys > queries[:, None] - window)
    if not torch.equal(seen(queries).expand(expected.shape), expected):
        raise ConfigError("its mask is neither causal nor a sliding window, which is not supported")
    return torch.tensor(window if window < count else 0).view(1, 1, 1, 1)


def _rows(x: torch.Tensor, dim: int) -> torch.Tensor:
    """[1, heads, T, n] as float32 [T, heads, dim]; zeros beyond n change no product."""
    x = x[0].transpose(0, 1).float()
    return F.pad(x, (0, dim - x.shape[2])) if x.shape[2] < dim else x.contiguous()
