"""Our paged attention under the modules of transformers, through its attention registry.

The registry calls functions, which find the model's own `PagedAttention` on the module that calls; masks have
a registry too, in which ours says what a mask is instead of making one. Modules that do not ask the registry
come here by way of `written_out`.
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
from engine.models.fallback.written_out import Mask, StandIn
from engine.ops.attention_plan import AttentionPlan, LayerCache

NAME = "engine_paged"
WRITTEN_OUT = "engine_written_out"
"""The second is of models whose modules do not ask the registry, but make masks."""
BIAS_PARTS = 3
"""Numbers of a key that hold the bias of its position, each exact in bfloat16."""
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
        self._step: tuple[AttentionPlan, torch.Tensor, KVLayers, torch.Tensor] | None = None

    @property
    def is_dry(self) -> bool:
        return self._step is None or self._ops is None

    def bind(self, ops: ModuleType, ctx: Any) -> None:
        """From now on compute with these."""
        self._ops, self._ctx = ops, ctx
        self._places = {layer: place for place, layer in enumerate(sorted(self.layers))}

    @contextlib.contextmanager
    def step(
        self, plan: AttentionPlan, slot_ids: torch.Tensor, kv_layers: KVLayers, positions: torch.Tensor
    ) -> Iterator[None]:
        """Tokens of several sequences, one after the other, as `DecoderInputs` has them."""
        self._step = plan, slot_ids, kv_layers, positions.long()
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
        if self.is_dry:
            window = self._checked(module, mask, settings)
            self._learn(type(module).__name__, getattr(module, "layer_idx", None), key, value, window)
            return torch.zeros(1, query.shape[2], query.shape[1], value.shape[3])
        scale = settings.get("scaling")
        scale = query.shape[3] ** -0.5 if scale is None else float(scale)
        softcap, sinks = settings.get("softcap") or 0.0, settings.get("s_aux")
        if sinks is not None:
            sinks = sinks.detach().float().contiguous()
        return self._compute(module.layer_idx, query, key, value, scale, float(softcap), sinks)

    def attend_cached(
        self,
        index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        bias: torch.Tensor | None,
        window: int,
    ) -> torch.Tensor:
        """The same for a layer that asks no registry; `bias` [..., H, 1, positions] is added to scores.

        It becomes a part of the keys, which queries multiply by 1: the kernel knows of none.
        """
        if bias is not None:
            heads = query.shape[1]
            key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
            key = _with_bias(key, bias.reshape(heads, -1), None if self.is_dry else self._step[3])
            query, scale = F.pad(query * scale, (0, BIAS_PARTS), value=1.0), 1.0
        if self.is_dry:
            self._learn("attention", index, key, value, window, has_bias=bias is not None)
            return torch.zeros(1, query.shape[2], query.shape[1], value.shape[3])
        return self._compute(index, query, key, value, scale, 0.0, None)

    def _compute(
        self,
        index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        softcap: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        assert self._step is not None and self._ops is not None
        plan, slot_ids, kv_layers, _ = self._step
        layer = self.layers[index]
        caches = kv_layers[self._places[index]]
        keys, values, scales = (None if part is None else part[:, : layer.num_kv_heads] for part in caches)
        dim = keys.shape[2]
        q, k, v = (_rows(x, dim) for x in (query, key, value))
        self._ops.append_kv(self._ctx, k, v, keys, values, slot_ids, scales)
        out = torch.empty_like(q)
        self._ops.paged_attention(
            self._ctx, q, keys, values, plan, scale, layer.window, softcap, out, sinks, scales
        )
        return out[None, :, :, : layer.value_dim]

    def _checked(
        self, module: torch.nn.Module, mask: torch.Tensor | None, settings: Mapping[str, Any]
    ) -> int:
        """The window. Raises: `ConfigError` for what our attention does not do."""
        kind = type(module).__name__
        for name, setting in settings.items():
            is_off = setting is None or setting is False
            if not is_off and name not in _UNDERSTOOD and name not in _HARMLESS:
                raise ConfigError(f"{kind} gives attention {name}, which is not supported")
        if settings.get("is_causal") is False:
            raise ConfigError(f"{kind} sees later tokens, which a decoder cannot")
        if mask is None:
            return settings.get("sliding_window") or 0
        if mask.dtype != torch.int64 or mask.numel() != 1:
            raise ConfigError(f"{kind} has a mask of its own, which is not supported")
        return int(mask)

    def _learn(
        self,
        kind: str,
        index: int | None,
        key: torch.Tensor,
        value: torch.Tensor,
        window: int,
        has_bias: bool = False,
    ) -> None:
        """Raises: `ConfigError` for layers that share what they keep."""
        if not isinstance(index, int) or index in self.layers:
            raise ConfigError(f"{kind} does not have keys and values of its own in each layer")
        self.layers[index] = AttentionLayer(key.shape[1], key.shape[3], value.shape[3], window, has_bias)


def register() -> None:
    """Make attention and masks of ours known to transformers under `NAME`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _marker)
    AttentionMaskInterface.register(WRITTEN_OUT, _stand_in)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    return module.engine_attention.attend(module, query, key, value, attention_mask, settings), None


def _marker(*, mask_function: Callable[..., torch.Tensor], config: Any, **_: Any) -> torch.Tensor:
    """What a mask is, int64 [1, 1, 1, 1]."""
    return torch.tensor(_window_of(mask_function, config)).view(1, 1, 1, 1)


def _stand_in(
    *, mask_function: Callable[..., torch.Tensor], config: Any, q_length: int, kv_length: int, **_: Any
) -> torch.Tensor:
    """The same for modules that add a mask to scores of their own."""
    return StandIn.of_shape(torch.Size((1, 1, q_length, kv_length)), Mask(_window_of(mask_function, config)))


def _window_of(mask_function: Callable[..., torch.Tensor], config: Any) -> int:
    """The tokens that a query sees, itself included; 0: all before it.

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
    return window if window < count else 0


def _rows(x: torch.Tensor, dim: int) -> torch.Tensor:
    """[1, heads, T, n] as float32 [T, heads, dim]; zeros beyond n change no product."""
    x = x[0].transpose(0, 1).float()
    return F.pad(x, (0, dim - x.shape[2])) if x.shape[2] < dim else x.contiguous()


def _with_bias(key: torch.Tensor, bias: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """Keys [1, H, T, D] with what `bias` [H, positions] has for each, in as many parts as keep all its bits
    where keys are bfloat16: [1, H, T, D + BIAS_PARTS]. In a dry run there are no positions."""
    rest = torch.zeros(key.shape[1:3]) if positions is None else bias.float()[:, positions]
    parts = []
    for _ in range(BIAS_PARTS):
        parts.append(rest.bfloat16().float())
        rest = rest - parts[-1]
    return torch.cat([key, torch.stack(parts, -1)[None]], -1)
