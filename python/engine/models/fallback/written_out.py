"""Our paged attention under modules of transformers that write their attention out.

Such a module hands its keys and values to a cache, gets those of all tokens back, and then multiplies, adds
and normalises by itself. Here the cache is a `CacheView`, and what it gives back stands for all positions:
tensors without numbers, which follow what is done with them (torch's `__torch_function__` protocol). A
product of queries and such keys is `Scores`, of which a factor and a bias are remembered, and the product of
scores and values is our attention. So a module keeps its code, and a step its many requests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from engine.errors import ConfigError

if TYPE_CHECKING:
    from engine.models.fallback.attention import PagedAttention

_ASK = frozenset(("__get__", "size", "dim", "numel", "ndimension", "is_floating_point", "__len__"))
_KEEP = frozenset(
    ("view", "reshape", "transpose", "permute", "contiguous", "to", "type", "float", "expand", "unsqueeze")
    + ("squeeze", "flatten", "unflatten", "__getitem__", "clone", "broadcast_to", "dropout")
)
"""Functions that leave a stand-in what it is, perhaps in another shape."""
_MULTIPLY = frozenset(("matmul", "__matmul__", "bmm"))
_SCALE_UP = frozenset(("mul", "__mul__", "__rmul__", "multiply", "__imul__", "mul_"))
_SCALE_DOWN = frozenset(("div", "__truediv__", "divide", "true_divide", "__itruediv__", "__idiv__", "div_"))
_ADD = frozenset(("add", "__add__", "__radd__", "__iadd__", "add_"))
_COMPARE = frozenset(("lt", "__lt__", "gt", "__gt__", "eq", "__eq__", "le", "__le__", "ge", "__ge__"))
_CHOOSE = frozenset(("masked_fill", "masked_fill_", "where", "max", "maximum"))


class CacheView:
    """What modules take for a cache of transformers' in a step of `num_tokens` tokens.

    It says that these come last of `num_positions`, so that a bias which they make has a column for each.
    """

    is_compileable = False
    is_sliding = is_linear = is_dummy = ()

    def __init__(self, attention: PagedAttention, num_positions: int, num_tokens: int) -> None:
        self._attention, self._num_tokens = attention, num_tokens
        self._num_positions = max(num_positions, num_tokens)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._num_positions - self._num_tokens

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._num_positions, 0

    def get_max_length(self, layer_idx: int = 0) -> int:
        return self._num_positions

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[StandIn, StandIn]:
        """Shapes: `keys` [1, G, T, D], `values` [1, G, T, V]."""
        cached = Cached(self._attention, layer_idx, keys, values)
        keys, values = (x[:, :, :1].expand(-1, -1, self._num_positions, -1) for x in (keys, values))
        return StandIn.of_shape(keys.shape, cached), StandIn.of_shape(values.shape, cached)


@dataclasses.dataclass(frozen=True)
class Cached:
    """The keys and values of a layer, those of this step being here."""

    attention: PagedAttention
    index: int
    keys: torch.Tensor
    values: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Mask:
    """Who sees whom, a window of 0 meaning all earlier tokens, and a bias [..., 1, positions] of each key."""

    window: int
    bias: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Scores:
    """scale * queries keysᵀ + bias, normalised or not. Shapes: `queries` [..., T, D]; `bias` as of `Mask`."""

    cached: Cached
    queries: torch.Tensor
    scale: float = 1.0
    bias: torch.Tensor | None = None
    window: int = 0

    def times(self, factor: float) -> Scores:
        bias = None if self.bias is None else self.bias * factor
        return dataclasses.replace(self, scale=self.scale * factor, bias=bias)

    def plus(self, bias: torch.Tensor | None) -> Scores:
        """Raises: `ConfigError` for a bias that depends on the query."""
        if bias is None or bias.device.type == "meta" or bias.ndim == 0 or bias.shape[-1] == 1:
            return self  # the same for all keys, which changes no answer; made beside a stand-in: a constant
        if bias.ndim < 2 or bias.shape[-2] != 1:
            raise ConfigError("its attention has a bias for each pair of tokens, which is not supported")
        return dataclasses.replace(self, bias=bias if self.bias is None else self.bias + bias)

    def masked(self, mask: Mask) -> Scores:
        windows = [window for window in (self.window, mask.window) if window]
        return dataclasses.replace(self.plus(mask.bias), window=min(windows, default=0))

    def of_values(self, shape: torch.Size) -> torch.Tensor:
        """The product with values, float32 [..., T, V] as `shape` says."""
        cached = self.cached
        queries = self.queries.reshape(1, -1, *self.queries.shape[-2:])
        out = cached.attention.attend_cached(
            cached.index, queries, cached.keys, cached.values, self.scale, self.bias, self.window
        )
        return out.transpose(1, 2).reshape(shape)


class StandIn(torch.Tensor):
    """A tensor of which there is but the shape, and `what` it stands for."""

    what: Cached | Scores | Mask

    @classmethod
    def of_shape(cls, shape: torch.Size, what: Cached | Scores | Mask) -> StandIn:
        tensor = torch.empty((), device="meta").expand(shape).as_subclass(cls)
        tensor.what = what
        return tensor

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", str(func))
        if name in _ASK:
            return super().__torch_function__(func, types, args, kwargs)
        if func is F.softmax or name == "softmax":
            return args[0]
        if name in _KEEP:
            with torch._C.DisableTorchFunctionSubclass():
                shape = func(args[0].as_subclass(torch.Tensor), *args[1:], **kwargs).shape
            return cls.of_shape(shape, args[0].what)
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if name in _MULTIPLY:
            return _product(args[0], args[1])
        if name == "baddbmm":
            return _product_and_bias(*args, **kwargs)
        return _changed(name, (*args, *kwargs.values()))


def _stands_for(x: Any, kind: type) -> bool:
    return isinstance(x, StandIn) and isinstance(x.what, kind)


def _product(left: Any, right: Any) -> torch.Tensor:
    """Scores of queries and keys, or numbers of scores and values."""
    shape = torch.Size((*left.shape[:-1], right.shape[-1]))
    if _stands_for(right, Cached) and not isinstance(left, StandIn):
        return StandIn.of_shape(shape, Scores(right.what, left))
    if _stands_for(left, Scores) and _stands_for(right, Cached):
        return left.what.of_values(shape)
    raise ConfigError("its attention multiplies something besides queries and keys, which is not supported")


def _product_and_bias(
    bias: torch.Tensor, batch1: torch.Tensor, batch2: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    scores = _product(batch1, batch2)
    what = scores.what.times(float(alpha)).plus(bias * beta)
    return StandIn.of_shape(scores.shape, what)


def _attention(
    query: torch.Tensor,
    key: StandIn,
    value: StandIn,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    scores = Scores(key.what, query, query.shape[-1] ** -0.5 if scale is None else scale)
    if isinstance(attn_mask, StandIn):
        scores = scores.masked(attn_mask.what)
    elif attn_mask is not None:
        scores = scores.plus(attn_mask)
    return scores.of_values(torch.Size((*query.shape[:-1], value.shape[-1])))


def _changed(name: str, given: tuple[Any, ...]) -> StandIn:
    """Scores or a mask after one more step. Raises: `ConfigError` for a step that is not known."""
    scores = next((x for x in given if _stands_for(x, Scores)), None)
    mask = next((x for x in given if _stands_for(x, Mask)), None)
    others = [x for x in given if not isinstance(x, StandIn)]
    if scores is None and mask is not None:
        if name in _COMPARE:
            return mask
        if name in _CHOOSE:  # a bias for those who see, next to nothing for others
            biases = [x for x in others if isinstance(x, torch.Tensor) and x.ndim > 1]
            bias = biases[0] if biases else mask.what.bias
            return StandIn.of_shape(mask.shape, Mask(mask.what.window, bias))
    if scores is not None:
        what = None
        if name in _SCALE_UP or name in _SCALE_DOWN:
            (factor,) = others
            what = scores.what.times(float(factor) if name in _SCALE_UP else 1 / float(factor))
        elif name in _ADD:
            what = scores.what.masked(mask.what) if mask is not None else scores.what.plus(others[0])
        elif name in _CHOOSE:
            seen = next((x for x in others if isinstance(x, torch.Tensor) and x.dtype == torch.bool), None)
            what = scores.what
            if mask is not None:
                what = what.masked(mask.what)
            elif seen is not None and what.cached.attention.is_dry:
                what = what.masked(Mask(_window_of_rows(~seen if name.startswith("masked") else seen)))
        if what is not None:
            if name.startswith("__i") or (name.endswith("_") and not name.startswith("__")):
                scores.what = what
                return scores
            return StandIn.of_shape(scores.shape, what)
    raise ConfigError(f"its attention uses {name}, which is not supported")


def _window_of_rows(seen: torch.Tensor) -> int:
    """What a mask of the last tokens of a context is, bool [..., T, positions]: the tokens that a query sees,
    itself included; 0: all before it.

    Raises: `ConfigError` when it is neither.
    """
    num_rows, count = seen.shape[-2:]
    rows = seen.reshape(-1, count)[-num_rows:]
    window = int(rows[-1].sum())
    keys, queries = torch.arange(count), torch.arange(count - num_rows, count)[:, None]
    if not torch.equal(rows, (keys <= queries) & (keys > queries - window)):
        raise ConfigError("its mask is neither causal nor a sliding window, which is not supported")
    return window if window < count else 0
