"""The adapters that scripts name, for `LLM` and `AsyncEngine`."""

from __future__ import annotations

from pathlib import Path

from engine.core.messages import AdapterLoaded, AdapterRef
from engine.errors import InvalidRequest


def adapter_directory(model_path: str, lora_path: str) -> str:
    """The directory of an adapter: one that comes with the model, by its name, or else a path."""
    own = Path(model_path) / "adapters" / lora_path
    return str((own if own.is_dir() else Path(lora_path).expanduser()).resolve())


def loaded_ref(answer: AdapterLoaded) -> AdapterRef:
    """What requests carry. Raises: `InvalidRequest` when the adapter cannot be used."""
    if answer.error is not None:
        raise InvalidRequest(f"{answer.directory}: {answer.error}", slug=answer.slug, param="lora_path")
    return AdapterRef(answer.directory, answer.digest)
