"""The part of a checkpoint that also sees which reads and writes text. No torch here.

Such a config.json nests the facts of that part as `text_config`, without those that are the defaults of its
class, and the tensors of all parts lie side by side.
Source: transformers' Gemma3Config and Mistral3Config, and what checkpoints of both hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class _Part(NamedTuple):
    architecture: str
    defaults: Mapping[str, Any]


_PARTS: Mapping[str, _Part] = MappingProxyType(
    {
        "Gemma3ForConditionalGeneration": _Part(
            "Gemma3ForCausalLM",
            {
                "vocab_size": 262208,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "max_position_embeddings": 131072,
            },
        ),
        "Mistral3ForConditionalGeneration": _Part("MistralForCausalLM", {}),
    }
)
_OF_THE_WHOLE = ("dtype", "torch_dtype", "eos_token_id", "quantization_config")
"""What a config.json says outside of `text_config` that holds for the part, too."""
_PREFIXES = MappingProxyType(
    {"language_model.model.": "model.", "language_model.": "", "model.language_model.": "model."}
)
"""What names of the part begin with in old and in new files, and in a checkpoint of the part alone."""
_OTHERS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def text_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json as one of the part alone would be; any other as it is."""
    names, nested = config.get("architectures"), config.get("text_config")
    known = [name for name in names if isinstance(name, str) and name in _PARTS] if _is_list(names) else []
    if not known or not isinstance(nested, Mapping):
        return dict(config)
    part = _PARTS[known[0]]
    outer = {key: config[key] for key in _OF_THE_WHOLE if config.get(key) is not None}
    own = {key: value for key, value in nested.items() if value is not None or key not in part.defaults}
    return {**part.defaults, **outer, **own, "architectures": [part.architecture]}


def name_in_part(name: str) -> str:
    """What a tensor of the part is called in a checkpoint of the part alone; other names as they are."""
    for theirs, ours in _PREFIXES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def is_of_other_part(name: str) -> bool:
    """Whether a tensor is of what sees."""
    return name.startswith(_OTHERS)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)
