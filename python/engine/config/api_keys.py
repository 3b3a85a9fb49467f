"""Who may ask, and how much: API keys from flags and from a file."""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib
from pathlib import Path
from typing import Any

from engine.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MOST_PER_MINUTE = 2**53


@dataclasses.dataclass(frozen=True, kw_only=True)
class ApiKey:
    """One key. `name` stands for it wherever it is mentioned; the key itself never is.

    Keys share running slots in proportion to `weight`. None of `*_per_minute`: no limit.
    """

    name: str
    key: str = dataclasses.field(repr=False)
    weight: float = 1.0
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"{self.name!r:.80} is no name for a key: letters, digits, '.', '_' and '-'")
        if not isinstance(self.key, str) or not self.key.strip():
            raise ConfigError(f"the key of {self.name} must be a text that is not empty")
        if not _is_number(self.weight) or not 0.001 <= self.weight <= 1000:
            raise ConfigError(f"the weight of {self.name} must be a number in [0.001, 1000]")
        for field in ("requests_per_minute", "tokens_per_minute"):
            value = getattr(self, field)
            if value is not None and (type(value) is not int or not 1 <= value <= _MOST_PER_MINUTE):
                raise ConfigError(f"{field} of {self.name} must be a whole number of at least 1")


def read_api_keys(keys: tuple[str, ...], path: str | None) -> tuple[ApiKey, ...]:
    """Those given as flags, named key-1 and so on, and those of the file. Raises: `ConfigError`."""
    found = [ApiKey(name=f"key-{i}", key=key) for i, key in enumerate(dict.fromkeys(keys), 1)]
    if path is not None:
        found += [_api_key(path, name, fields) for name, fields in _read(path).items()]
    for field in ("name", "key"):
        values = [getattr(key, field) for key in found]
        if len(set(values)) < len(values):
            raise ConfigError(f"--api-key-file: two keys have the same {field}")
    return tuple(found)


def _api_key(path: str, name: str, fields: Any) -> ApiKey:
    known = {field.name for field in dataclasses.fields(ApiKey)} - {"name"}
    if not isinstance(fields, dict):
        raise ConfigError(f"--api-key-file {path}: expected tables like [name] with a key in each")
    if unknown := set(fields) - known:
        raise ConfigError(f"--api-key-file {path}: [{name}] has an unknown field {min(unknown)!r:.80}")
    if "key" not in fields:
        raise ConfigError(f"--api-key-file {path}: [{name}] has no key")
    return ApiKey(name=name, **fields)


def _read(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"cannot read --api-key-file {path}: {reason}") from None
    except (tomllib.TOMLDecodeError, RecursionError):  # the message could show a part of a key
        raise ConfigError(f"--api-key-file {path} is not valid TOML") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
