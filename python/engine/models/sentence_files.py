"""The files of the sentence-transformers format that bi-encoders and cross-encoders share. No torch here.

What they may say and we do not do is refused: a setting that is passed over makes wrong vectors silently.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.config.model_location import root_of
from engine.errors import ConfigError
from engine.models.hf_config import flag, integer, read_json

LIMITS_FILE = "sentence_bert_config.json"
OLD_LIMITS_FILES = tuple(
    f"sentence_{kind}_config.json" for kind in ("roberta", "distilbert", "camembert", "albert", "xlm-roberta")
)
"""What the first versions called it; sentence-transformers reads the first that there is."""
PROMPTS_FILE = "config_sentence_transformers.json"
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
_TASKS = ("feature-extraction", "sequence-classification")
_OUTPUTS = ("last_hidden_state", "logits")
_REFUSED = (
    "processing_kwargs", "query_length", "document_length", "query_expansion",
    "config_args", "config_kwargs", "tokenizer_args", "processor_kwargs",
)  # fmt: skip
_HARMLESS = frozenset(
    ("attn_implementation", "add_pooling_layer", "device_map", "dtype", "low_cpu_mem_usage", "torch_dtype")
)
"""Of what transformers is told when it loads the model: nothing that changes what it computes. Anything else
may replace a field of config.json."""
_NO_LIMIT = 10**9
"""Tokenizers without a limit say a number beyond any text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentenceFiles:
    """`max_len` is the limit that the checkpoint gives, in tokens, None if it gives none. `activation` names
    the class that a cross-encoder puts its scores through; it is compared, never imported. `similarity` is
    the measure by which vectors are to be compared, one of `SIMILARITIES`."""

    max_len: int | None = None
    lowers_case: bool = False
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    default_prompt: str | None = None
    activation: str | None = None
    similarity: str = SIMILARITIES[0]


def read_sentence_files(directory: Path) -> SentenceFiles:
    """Each file may be absent. Raises: `ConfigError` for what is broken or asks for what is not done."""
    names = (LIMITS_FILE, *OLD_LIMITS_FILES)
    limits_file = next((name for name in names if (directory / name).exists()), LIMITS_FILE)
    limits, settings = _optional(directory / limits_file), _optional(root_of(directory) / PROMPTS_FILE)
    _check(limits, limits_file)
    if settings.get("truncate_dim") is not None:
        raise ConfigError(f"{PROMPTS_FILE}: truncate_dim is not supported; requests may ask for dimensions")
    prompts, default_prompt = _prompts(settings)
    activation = settings.get("activation_fn")
    if activation is not None and not isinstance(activation, str):
        raise ConfigError(f"{PROMPTS_FILE}: activation_fn must be a name, got {activation!r:.80}")
    similarity = settings.get("similarity_fn_name") or SIMILARITIES[0]
    if similarity not in SIMILARITIES:
        known = ", ".join(SIMILARITIES)
        raise ConfigError(
            f"{PROMPTS_FILE}: similarity_fn_name {similarity!r:.80} is not supported; supported: {known}"
        )
    return SentenceFiles(
        max_len=_max_len(limits, limits_file, directory),
        lowers_case=flag(limits, "do_lower_case", file=limits_file),
        prompts=prompts,
        default_prompt=default_prompt,
        activation=activation,
        similarity=similarity,
    )


def _max_len(limits: Mapping[str, Any], file: str, directory: Path) -> int | None:
    """Older versions write the limit into a file of their own, newer ones leave it with the tokenizer."""
    if limits.get("max_seq_length") is not None:
        return integer(limits, "max_seq_length", file=file)
    found = _optional(directory / "tokenizer_config.json").get("model_max_length")
    return found if type(found) is int and 0 < found < _NO_LIMIT else None


def _check(limits: Mapping[str, Any], file: str) -> None:
    for key in _REFUSED:
        if limits.get(key):
            raise ConfigError(f"{file}: {key} is not supported")
    for key in ("model_args", "model_kwargs"):
        given = limits.get(key) or {}
        if not isinstance(given, Mapping) or not given.keys() <= _HARMLESS:
            raise ConfigError(f"{file}: {key} {given!r:.80} is not supported")
    if limits.get("transformer_task", _TASKS[0]) not in _TASKS:
        raise ConfigError(f"{file}: transformer_task must be one of {', '.join(_TASKS)}")
    modalities = limits.get("modality_config")
    text = modalities.get("text") if isinstance(modalities, Mapping) else None
    if modalities is not None and (
        not isinstance(text, Mapping) or text.get("method_output_name", _OUTPUTS[0]) not in _OUTPUTS
    ):
        raise ConfigError(f"{file}: modality_config must have text that becomes {_OUTPUTS[0]}")


def _prompts(settings: Mapping[str, Any]) -> tuple[Mapping[str, str], str | None]:
    prompts = settings.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise ConfigError(f"{PROMPTS_FILE}: prompts must map names to texts")
    default = settings.get("default_prompt_name")
    if default is not None and (not isinstance(default, str) or default not in prompts):
        raise ConfigError(f"{PROMPTS_FILE}: there is no prompt {default!r:.80}")
    return prompts, default


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
