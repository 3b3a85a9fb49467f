"""Read adapter_config.json as PEFT writes it: which modules have which rank and scale. No torch here."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from engine.errors import InvalidRequest

MAX_CONFIG_BYTES = 1 << 20
MAX_PATTERNS = 1024
MAX_REPEATS_OF_ALL = 32
MAX_PATTERN_CHARS = 512
MAX_REPEATS = 4
MAX_GROUPS = 8

# Fields that change what an adapter means, with the values under which they change nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "use_qalora": (False,),
    "use_bdlora": (),
    "fan_in_fan_out": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "modules_to_save": ([],),
    "trainable_token_indices": ([], {}),
    "alora_invocation_tokens": ([],),
    "layer_replication": ([],),
    "target_parameters": ([],),
    "arrow_config": (),
    "kasa_config": (),
    "monteclora_config": (),
    "ensure_weight_tying": (False,),
}
# Ways to begin that change the base's weights too.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_TASKS = (None, "CAUSAL_LM", "FEATURE_EXTRACTION")
_ALL_LINEAR = "all-linear"
_LAYER = re.compile(r"\.layers\.(\d+)\.")


def invalid_adapter(what: str) -> InvalidRequest:
    """The refusal of an adapter's files."""
    return InvalidRequest(f"The adapter cannot be used: {what}", slug="invalid_adapter", param="lora_path")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """What adapter_config.json says, checked. Names are those of modules, as `model.layers.0.mlp.up_proj`, or
    without `model.`."""

    rank: int
    alpha: float
    is_rank_stabilised: bool
    targets: str | tuple[str, ...]
    excluded: str | tuple[str, ...]
    layers: frozenset[int] | None
    rank_patterns: Mapping[re.Pattern[str], int]
    alpha_patterns: Mapping[re.Pattern[str], float]

    @classmethod
    def parse(cls, data: bytes) -> PeftConfig:
        """Raises: `InvalidRequest` that names the field."""
        fields = _json_object(data)
        _check_kind(fields)
        rank_patterns = _patterns(fields, "rank_pattern", _rank)
        alpha_patterns = _patterns(fields, "alpha_pattern", _alpha)
        return cls(
            rank=_rank("r", fields.get("r")),
            alpha=_alpha("lora_alpha", fields.get("lora_alpha")),
            is_rank_stabilised=_flag(fields, "use_rslora"),
            targets=_names(fields, "target_modules"),
            excluded=_names(fields, "exclude_modules", ()),
            layers=_layers(fields),
            rank_patterns=rank_patterns,
            alpha_patterns=alpha_patterns,
        )

    def is_targeted(self, module: str) -> bool:
        """Whether PEFT puts an adapter on a module of this name."""
        if _is_named(self.excluded, module):
            return False
        if self.targets == _ALL_LINEAR:
            return module not in ("lm_head", "model.embed_tokens", "embed_tokens")
        if not _is_named(self.targets, module):
            return False
        if self.layers is None or isinstance(self.targets, str) or module in self.targets:
            return True
        layer = _LAYER.search(module)
        return layer is not None and int(layer[1]) in self.layers

    def rank_of(self, module: str) -> int:
        return _by_pattern(self.rank_patterns, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What B A x is multiplied by."""
        rank, alpha = self.rank_of(module), _by_pattern(self.alpha_patterns, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank)


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise invalid_adapter(f"adapter_config.json is not valid JSON: {str(error)[:100]}") from None
    if not isinstance(fields, dict):
        raise invalid_adapter("adapter_config.json must hold a JSON object")
    return fields


def _check_kind(fields: Mapping[str, Any]) -> None:
    if fields.get("peft_type") != "LORA":
        raise invalid_adapter(f"peft_type must be LORA, got {fields.get('peft_type')!r:.40}")
    if fields.get("task_type") not in _TASKS:
        raise invalid_adapter(f"task_type {fields['task_type']!r:.40} is not supported")
    for name, value in fields.items():
        is_switched_on = name.startswith("use_") and name != "use_rslora" and value not in (False, None)
        if (name in _NEUTRAL and value is not None and value not in _NEUTRAL[name]) or is_switched_on:
            raise invalid_adapter(f"{name:.60} {value!r:.60} is not supported")
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        raise invalid_adapter(
            f"init_lora_weights {start!r:.40} changes the base model too; convert the adapter to a plain one"
        )


def _rank(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise invalid_adapter(f"{name} must be a positive integer, got {value!r:.40}")
    return value


def _alpha(name: str, value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not abs(value) < 1e30:
        raise invalid_adapter(f"{name} must be a number, got {value!r:.40}")
    return float(value)


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value not in (None, True, False):
        raise invalid_adapter(f"{name} must be true or false, got {value!r:.40}")
    return bool(value)


def _names(fields: Mapping[str, Any], name: str, default: Any = None) -> str | tuple[str, ...]:
    """A pattern, or a list of names."""
    value = fields.get(name)
    if value is None:
        value = default
    if isinstance(value, str) and value:
        return value if value == _ALL_LINEAR else _checked_pattern(name, value)
    is_list = isinstance(value, (list, tuple)) and len(value) <= MAX_PATTERNS
    if not is_list or not all(isinstance(item, str) for item in value) or (default is None and not value):
        raise invalid_adapter(f"{name} must be a pattern or a list of module names, got {value!r:.60}")
    return tuple(value)


def _layers(fields: Mapping[str, Any]) -> frozenset[int] | None:
    value = fields.get("layers_to_transform")
    if value is None or value == []:
        return None
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) for item in items):
        raise invalid_adapter(f"layers_to_transform must hold integers, got {value!r:.60}")
    if fields.get("layers_pattern") not in (None, "", [], "layers", ["layers"]):
        raise invalid_adapter(f"layers_pattern must be layers, got {fields['layers_pattern']!r:.40}")
    return frozenset(items)


def _patterns(fields: Mapping[str, Any], name: str, check: Any) -> dict[re.Pattern[str], Any]:
    """Compiled, because each is tried on the name of every module: on its end after a dot, or all of it."""
    value = fields.get(name) or {}
    if not isinstance(value, dict) or len(value) > MAX_PATTERNS:
        raise invalid_adapter(
            f"{name} must be an object of at most {MAX_PATTERNS} patterns, got {value!r:.60}"
        )
    if sum(map(_num_repeats, value)) > MAX_REPEATS_OF_ALL:
        raise invalid_adapter(f"{name}: the patterns together have more than {MAX_REPEATS_OF_ALL} repeats")
    return {
        re.compile(rf"(.*\.)?({_checked_pattern(name, key)})$"): check(f"{name} of {key!r:.60}", item)
        for key, item in value.items()
    }


def _num_repeats(pattern: str) -> int:
    return len(re.findall(r"(?<!\\)(?:\*|\+|\{|(?<![(*+?}])\?)", pattern))


def _checked_pattern(name: str, pattern: str) -> str:
    """A regular expression that cannot take long: few groups, few repeats, and none of a group."""
    is_simple = _num_repeats(pattern) <= MAX_REPEATS and pattern.count("(") <= MAX_GROUPS
    if len(pattern) > MAX_PATTERN_CHARS or not is_simple or re.search(r"\)[*+{]", pattern):
        raise invalid_adapter(f"{name}: the pattern {pattern!r:.60} is too complicated")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise invalid_adapter(f"{name}: the pattern {pattern!r:.60} is wrong: {error}") from None
    return pattern


def _is_named(names: str | Iterable[str], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _by_pattern(patterns: Mapping[re.Pattern[str], Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches."""
    for pattern, value in patterns.items():
        if pattern.match(module):
            return value
    return default
