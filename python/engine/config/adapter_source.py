"""What --lora-paths says of one adapter."""

from __future__ import annotations

import dataclasses
import json

from engine.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class AdapterSource:
    """A value of --lora-paths."""

    name: str
    path: str
    is_pinned: bool = False

    @classmethod
    def parse(cls, text: str) -> AdapterSource:
        """PATH, NAME=PATH or a JSON object. Raises: `ConfigError`."""
        if text.startswith("{"):
            return cls._parse_json(text)
        name, _, path = text.partition("=") if "=" in text else (text, "", text)
        if not name or not path:
            raise ConfigError(f"--lora-paths expects PATH or NAME=PATH, got {text!r:.200}")
        return cls(name, path)

    @classmethod
    def _parse_json(cls, text: str) -> AdapterSource:
        try:
            fields = json.loads(text)
            source = cls(fields.pop("lora_name"), fields.pop("lora_path"), fields.pop("pinned", False))
        except (ValueError, KeyError, RecursionError):
            source, fields = None, {}
        if (
            source is None
            or fields
            or not isinstance(source.is_pinned, bool)
            or not (
                isinstance(source.name, str) and isinstance(source.path, str) and source.name and source.path
            )
        ):
            raise ConfigError(
                f"--lora-paths expects JSON with lora_name, lora_path and perhaps pinned, got {text!r:.200}"
            )
        return source
