"""The adapters that scripts name, for `LLM` and `AsyncEngine`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from engine.core.messages import AdapterLoaded, AdapterRef
from engine.errors import InvalidRequest


class AdapterFiles(NamedTuple):
    """The directory of an adapter, and what changes when its files do: then they are read again."""

    directory: str
    state: tuple[tuple[int, int, int], ...]


def adapter_files(model_path: str, lora_path: str) -> AdapterFiles:
    """Those of an adapter that comes with the model, by its name, or else by a path."""
    own = Path(model_path) / "adapters" / lora_path
    directory = (own if own.is_dir() else Path(lora_path).expanduser()).resolve()
    found = [path.stat() for path in sorted(directory.glob("adapter_*")) if path.is_file()]
    return AdapterFiles(str(directory), tuple((s.st_mtime_ns, s.st_size, s.st_ino) for s in found))


def loaded_ref(answer: AdapterLoaded) -> AdapterRef:
    """What requests carry. Raises: `InvalidRequest` when the adapter cannot be used."""
    if answer.error is not None:
        raise InvalidRequest(f"{answer.directory}: {answer.error}", slug=answer.slug, param="lora_path")
    return AdapterRef(answer.directory, answer.digest)
