"""Where the checkpoint is: the bundled one, a directory, or a repository on the Hugging Face hub."""

from __future__ import annotations

import json
import re
from pathlib import Path

import engine
from engine.errors import ConfigError
from engine.gguf_file import is_gguf

BUNDLED_NAME = "engine-demo"
BUNDLED_POOLING = "mean"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_DESCRIPTIONS = ("*.json", "*.jinja")
_WEIGHTS = ("*.safetensors",)
_CODE = ("*.py",)
_UNUSED = ("consolidated*", "original/*")
"""The same weights again as their maker has them."""
_MODULES_FILE = "modules.json"


def bundled_model() -> Path:
    """Directory of the model that comes with the package."""
    return Path(engine.__file__).parent / "demo" / "model"


def bundled_adapters() -> dict[str, Path]:
    """Directories of the adapters that come with it, by name."""
    return {path.name: path for path in sorted((bundled_model() / "adapters").glob("*/")) if path.is_dir()}


def check_model_path(model_path: str) -> Path | None:
    """The directory or GGUF file that `model_path` names, None if it can only be a hub id; fetches nothing.

    Raises: `ConfigError` if it is neither.
    """
    directory = Path(model_path).expanduser()
    if directory.is_dir():
        directory = _transformer_of(directory)
        if not (directory / "config.json").is_file():
            if found := next(directory.glob("*.gguf"), None):
                raise ConfigError(f"{model_path} has no config.json; of GGUF give the file: {found}")
            raise ConfigError(f"{model_path} is no checkpoint: it has no config.json")
        return directory.resolve()
    if directory.exists():
        if is_gguf(directory):
            return directory.resolve()
        raise ConfigError(f"{model_path} is a file; --model-path takes a directory, a GGUF file or a hub id")
    if not _HUB_ID.fullmatch(model_path):
        raise ConfigError(f"no such model directory: {model_path}")
    return None


def locate_model(model_path: str, *, with_weights: bool = True, with_code: bool = False) -> Path:
    """Directory, or GGUF file, of the checkpoint that `model_path` names.

    `with_weights`: false for who reads only what describes it; the weights may then be missing.
    `with_code`: true for who may run the Python code that comes with it.
    Effects: downloads what a hub id names and the local cache lacks.
    Raises: `ConfigError` with the reason.
    """
    return check_model_path(model_path) or _transformer_of(_from_hub(model_path, with_weights, with_code))


def root_of(directory: Path) -> Path:
    """Where the modules of a sentence-transformers checkpoint are listed: in the directory itself, or around
    it, as older versions gave the Transformer a folder of its own."""
    around = directory.parent
    is_folder = (
        not (directory / _MODULES_FILE).exists() and _transformer_of(around) == around / directory.name
    )
    return around if is_folder else directory


def _transformer_of(directory: Path) -> Path:
    """The folder of the Transformer that the list of modules names, or the directory itself."""
    try:
        first = json.loads((directory / _MODULES_FILE).read_text(encoding="utf-8"))[0]
        kind, folder = first["type"].rpartition(".")[2], first["path"]
        is_named = kind == "Transformer" and Path(folder).name == folder not in ("", "..")
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return directory  # who reads the list as a whole says what is wrong with it
    return directory / folder if is_named and (directory / folder / "config.json").is_file() else directory


def _from_hub(repository: str, with_weights: bool, with_code: bool) -> Path:
    import huggingface_hub

    needed = [*_DESCRIPTIONS, *(_WEIGHTS if with_weights else ()), *(_CODE if with_code else ())]

    def fetch(**options: bool) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                repository, allow_patterns=needed, ignore_patterns=list(_UNUSED), **options
            )
        )

    try:
        return fetch(local_files_only=True)
    except Exception:  # not in the cache, or not whole: the library raises many kinds
        pass
    try:
        return fetch()
    except Exception as error:
        reason = str(error).strip().split("\n")[0].split(". ")[0][:200]
        raise ConfigError(
            f"no such model directory: {repository}; as a hub id it could not be fetched either: "
            f"{type(error).__name__}: {reason}"
        ) from None
