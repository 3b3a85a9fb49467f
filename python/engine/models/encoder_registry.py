"""Which encoders are served, by the name that config.json gives them. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from engine.errors import ConfigError
from engine.models import bert, distilbert, modernbert, roberta
from engine.models.encoder_spec import EncoderSpec, activation_of
from engine.models.hf_config import MAX_LAYERS, dtype_of, integer, number, read_config
from engine.models.sentence_files import read_sentence_files

Facts = Callable[[Mapping[str, Any]], dict[str, Any]]

FAMILIES: Mapping[str, Facts] = MappingProxyType(
    {
        "Bert": bert.facts,
        "Roberta": roberta.facts,
        "XLMRoberta": roberta.facts,
        "DistilBert": distilbert.facts,
        "ModernBert": modernbert.facts,
    }
)
_PLAIN = ("Model", "ForMaskedLM")
_WITH_LABELS = "ForSequenceClassification"
_REFUSED = ("is_decoder", "add_cross_attention", "quantization_config", "pruned_heads")
HEAD_DIMS = range(16, 257, 16)
MAX_LABELS = 1024


def is_encoder(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of an encoder."""
    return _split(config) is not None


def read_encoder_spec(directory: str | Path) -> EncoderSpec:
    """Raises: `ConfigError`, one line, when config.json is broken or asks for what is not supported."""
    config = read_config(directory)
    found = _split(config)
    if found is None:
        raise ConfigError(f"not an encoder; supported: {', '.join(FAMILIES)}")
    family, has_labels = found
    if config.get("position_embedding_type", "absolute") not in ("absolute", None):
        raise ConfigError("config.json: position_embedding_type must be absolute")
    for key in _REFUSED:
        if config.get(key):
            raise ConfigError(f"config.json: {key} is not supported for an encoder")
    own = FAMILIES[family](config)
    facts = {
        "hidden_size": _unless(own, config, "hidden_size"),
        "num_layers": _unless(own, config, "num_hidden_layers", "num_layers", maximum=MAX_LAYERS),
        "num_heads": _unless(own, config, "num_attention_heads", "num_heads"),
        "intermediate_size": _unless(own, config, "intermediate_size"),
        "vocab_size": integer(config, "vocab_size"),
        "dtype": dtype_of(config),
        **({} if "activation" in own else {"activation": activation_of(config, "hidden_act", "gelu")}),
        **({} if "norm_eps" in own else {"norm_eps": number(config, "layer_norm_eps", 1e-12)}),
    }
    facts = {"windows": (0,) * facts["num_layers"]} | facts | own
    if has_labels:
        facts["num_labels"] = _num_labels(config)
        facts["label_activation"] = _label_activation(
            config, read_sentence_files(Path(directory)).activation, facts["num_labels"]
        )
    spec = EncoderSpec(architecture=family, **facts)
    if spec.hidden_size % spec.num_heads or spec.head_dim not in HEAD_DIMS:
        raise ConfigError(
            f"{spec.num_heads} heads of a hidden size of {spec.hidden_size} are not supported; "
            "a head has 16 to 256 numbers, in steps of 16"
        )
    return spec


def _split(config: Mapping[str, Any]) -> tuple[str, bool] | None:
    """Family, and whether it has a classification head; of the first architecture that is known."""
    names = config.get("architectures")
    for name in names if isinstance(names, list) else []:
        for family in FAMILIES:
            if name in [family + ending for ending in _PLAIN]:
                return family, False
            if name == family + _WITH_LABELS:
                return family, True
    return None


def _unless(
    own: Mapping[str, Any], config: Mapping[str, Any], key: str, field: str | None = None, **bounds: int
) -> int:
    """What the family read in its own way, else what config.json has under its usual name."""
    value = own.get(field or key)
    return integer(config, key, **bounds) if value is None else value


def _num_labels(config: Mapping[str, Any]) -> int:
    labels = config.get("id2label")
    if isinstance(labels, Mapping) and labels:
        return min(len(labels), MAX_LABELS)
    return integer(config, "num_labels", 2, maximum=MAX_LABELS)


def _label_activation(config: Mapping[str, Any], name: str | None, num_labels: int) -> str:
    """What cross-encoders put their scores through; names of classes, which are compared, never imported.

    Newer versions of sentence-transformers write the `name` beside config.json, older ones into it.
    """
    nested = config.get("sentence_transformers")
    name = name or (nested.get("activation_fn") if isinstance(nested, Mapping) else None)
    name = name or config.get("sbert_ce_default_activation_function")
    if name is None:
        return "sigmoid" if num_labels == 1 else ""
    known = {"Sigmoid": "sigmoid", "Identity": ""}
    kind = str(name).rpartition(".")[2]
    if kind not in known:
        raise ConfigError(f"the scores' activation {name!r:.80} is not supported")
    return known[kind]
