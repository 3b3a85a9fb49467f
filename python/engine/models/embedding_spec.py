"""How a checkpoint turns hidden states into one vector a text: pooling, dense layers, limits, prompts.

No torch here. What is read are the files of the sentence-transformers format: modules.json lists the
modules after the model itself, each with a folder that has a config.json.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.config.model_location import root_of
from engine.errors import ConfigError
from engine.gguf_file import GGUFFile, is_gguf
from engine.models.gguf_config import gguf_pooling
from engine.models.hf_config import flag, integer, read_config, read_json
from engine.models.sentence_files import SIMILARITIES, read_sentence_files

POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
    "pooling_mode_lasttoken": "last",
}
"""In the order in which the vectors of several modes are put one after the other."""

ACTIVATIONS = {"Identity": None, "Tanh": "tanh", "ReLU": "relu", "GELU": "gelu"}
MAX_DENSE_LAYERS = 8
_VECTOR = "sentence_embedding"
_PACKAGE = "sentence_transformers."
MAX_DIMENSIONS = 1024


@dataclasses.dataclass(frozen=True)
class DenseSpec:
    """A linear layer after pooling; its weights lie in `folder`."""

    folder: str
    in_features: int
    out_features: int
    has_bias: bool
    activation: str | None


@dataclasses.dataclass(frozen=True)
class NormSpec:
    """A layer normalisation of vectors of `size` numbers; its weights lie in `folder`."""

    folder: str
    size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingSpec:
    """`max_len` is the limit that the checkpoint gives, None if it gives none. `dimensions` are those
    to which a vector may be cut (Matryoshka); `any_dimension` allows all up to its size."""

    pooling: tuple[str, ...]
    is_normalized: bool
    dense: tuple[DenseSpec | NormSpec, ...] = ()
    max_len: int | None = None
    lowers_case: bool = False
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    default_prompt: str | None = None
    dimensions: tuple[int, ...] = ()
    any_dimension: bool = False
    similarity: str = SIMILARITIES[0]
    """By which measure vectors are compared."""

    @property
    def num_dense_elements(self) -> int:
        """Of the matrices after pooling."""
        return sum(d.in_features * d.out_features for d in self.dense if isinstance(d, DenseSpec))

    def longest_text(self, num_positions: int) -> int:
        """In tokens, for a model of so many positions."""
        return min(num_positions, self.max_len or num_positions)

    def size(self, hidden_size: int) -> int:
        """Numbers of a vector, for a model of this hidden size. Raises: `ConfigError` for a misfit."""
        size = hidden_size * len(self.pooling)
        for dense in self.dense:
            if isinstance(dense, NormSpec):
                if dense.size != size:
                    raise ConfigError(
                        f"{dense.folder}/config.json: dimension is {dense.size}, but it is given {size}"
                    )
                continue
            if dense.in_features != size:
                raise ConfigError(
                    f"{dense.folder}/config.json: in_features is {dense.in_features}, but it is given {size}"
                )
            size = dense.out_features
        return size


def is_embedding_checkpoint(directory: Path) -> bool:
    """Whether a checkpoint was made for embedding, whatever its architecture."""
    if is_gguf(directory):
        return gguf_pooling(GGUFFile(directory)) is not None
    return (root_of(directory) / "modules.json").is_file()


def read_embedding_spec(
    directory: Path, *, pooling: str | None = None, dimensions: str | None = None
) -> EmbeddingSpec:
    """From the checkpoint's own files; `pooling` takes the place of what they say about pooling.

    `dimensions` is a list of numbers with commas between, or "any", and takes the place of theirs. Without
    files of its own, a checkpoint is normalised.
    Raises: `ConfigError`, one line, for what is broken, contradicts itself or is not supported, and when
    neither the files nor `pooling` say how to pool.
    """
    spec = _read_own(directory) if is_embedding_checkpoint(directory) else None
    if spec is None:
        if pooling is None:
            raise ConfigError(
                f"{directory.name} does not say how to make one vector of a text (no modules.json, nor a "
                "pooling_type); give --pooling mean, cls, last or max"
            )
        spec = EmbeddingSpec(pooling=(pooling,), is_normalized=True)
    elif pooling is not None:
        spec = dataclasses.replace(spec, pooling=(pooling,))
    config = read_config(directory)
    return dataclasses.replace(spec, **_dimensions(config, dimensions))


def _read_own(directory: Path) -> EmbeddingSpec:
    if is_gguf(directory):
        pooling = gguf_pooling(GGUFFile(directory))
        assert pooling is not None
        return EmbeddingSpec(pooling=(pooling,), is_normalized=True)  # as llama.cpp does, whatever it is
    return _read_modules(directory)


def _read_modules(directory: Path) -> EmbeddingSpec:
    pooling: tuple[str, ...] = ()
    dense: list[DenseSpec | NormSpec] = []
    is_normalized = False
    root = root_of(directory)
    for index, (kind, folder) in enumerate(_modules(root)):
        if index == 0:
            if kind != "Transformer":
                raise ConfigError(f"modules.json: the first module must be a Transformer, got {kind!r:.80}")
            if root / folder != directory:
                raise ConfigError(f"modules.json: the Transformer's folder {folder!r:.80} has no config.json")
        elif kind == "Pooling" and not pooling:
            pooling = _pooling(read_json(root / folder / "config.json"), folder)
        elif kind == "Dense" and pooling and len(dense) < MAX_DENSE_LAYERS:
            dense.append(_dense(read_json(root / folder / "config.json"), folder))
        elif kind == "LayerNorm" and pooling and len(dense) < MAX_DENSE_LAYERS:
            dense.append(NormSpec(folder, integer(read_json(root / folder / "config.json"), "dimension")))
        elif kind == "Normalize" and pooling:
            is_normalized = True
        elif kind != "Dropout":  # which does nothing here
            raise ConfigError(f"modules.json: a module {kind!r:.80} at place {index} is not supported")
        if is_normalized and kind in ("Dense", "LayerNorm"):
            raise ConfigError(f"modules.json: a {kind} module after Normalize is not supported")
    if not pooling:
        raise ConfigError("modules.json lists no Pooling module")
    files = read_sentence_files(directory)
    return EmbeddingSpec(
        pooling=pooling,
        is_normalized=is_normalized,
        dense=tuple(dense),
        max_len=files.max_len,
        lowers_case=files.lowers_case,
        prompts=files.prompts,
        default_prompt=files.default_prompt,
        similarity=files.similarity,
    )


def _modules(directory: Path) -> list[tuple[str, str]]:
    """Class name and folder of each module; the names are never imported."""
    path = directory / "modules.json"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"cannot read modules.json in {directory}: {reason}") from None
    if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
        raise ConfigError("modules.json must hold a list of modules")
    modules = []
    for entry in entries:
        kind, folder = entry.get("type"), entry.get("path")
        if not isinstance(kind, str) or not isinstance(folder, str):
            raise ConfigError("modules.json: every module needs a type and a path")
        if folder and (Path(folder).name != folder or folder == ".." or not folder.isprintable()):
            raise ConfigError(f"modules.json: {folder!r:.80} is no folder of the checkpoint")
        if not kind.startswith(_PACKAGE):
            raise ConfigError(f"modules.json: {kind!r:.80} is code of the checkpoint, which is never run")
        modules.append((kind.rpartition(".")[2], folder))
    return modules


def _pooling(config: Mapping[str, Any], folder: str) -> tuple[str, ...]:
    mode = config.get("pooling_mode")
    if mode is None:
        modes = tuple(name for key, name in POOLING_FLAGS.items() if flag(config, key))
    else:
        names = {
            "lasttoken": "last",
            "weightedmean": "weighted_mean",
            "mean_sqrt_len_tokens": "mean_sqrt_len",
        }
        given = mode if isinstance(mode, list) else [mode]
        modes = tuple(names.get(m, m) for m in given if isinstance(m, str))
        if len(modes) != len(given):
            raise ConfigError(f"{folder}/config.json: pooling_mode must be a name, got {mode!r:.80}")
    unknown = set(modes).difference(POOLING_FLAGS.values())
    if unknown or not modes:
        raise ConfigError(f"{folder}/config.json: no supported pooling mode: {', '.join(sorted(unknown))}")
    if not flag(config, "include_prompt", True):
        raise ConfigError(f"{folder}/config.json: include_prompt false is not supported")
    return modes


def _dense(config: Mapping[str, Any], folder: str) -> DenseSpec:
    name = config.get("activation_function") or "Tanh"
    class_name = name.rpartition(".")[2] if isinstance(name, str) else ""
    if class_name not in ACTIVATIONS:
        raise ConfigError(
            f"{folder}/config.json: activation_function {name!r:.80} is not supported; "
            f"supported: {', '.join(ACTIVATIONS)}"
        )
    if flag(config, "use_residual"):
        raise ConfigError(f"{folder}/config.json: use_residual is not supported")
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, _VECTOR):
            raise ConfigError(f"{folder}/config.json: {key} must be {_VECTOR}, got {config[key]!r:.80}")
    return DenseSpec(
        folder,
        integer(config, "in_features"),
        integer(config, "out_features"),
        flag(config, "bias", True),
        ACTIVATIONS[class_name],
    )


def _dimensions(config: Mapping[str, Any], given: str | None) -> dict[str, Any]:
    if given == "any":
        return {"any_dimension": True}
    listed: Any = config.get("matryoshka_dimensions")
    if given is not None:
        listed = [int(part) if part.strip().isdecimal() else 0 for part in given.split(",")]
    if listed is None:
        return {"any_dimension": flag(config, "is_matryoshka")}
    if not isinstance(listed, list) or not all(type(d) is int and d > 0 for d in listed[:MAX_DIMENSIONS]):
        where = "--matryoshka-dimensions" if given is not None else "config.json: matryoshka_dimensions"
        raise ConfigError(f"{where} must be positive numbers, got {given or listed!r:.80}")
    return {"dimensions": tuple(sorted(set(listed[:MAX_DIMENSIONS])))}
