"""Sizes, counts and times that the HTTP side does not exceed, whatever a client does."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable

from engine.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Set with --limit name=value. Names end in their unit; a number alone is a count."""

    body_bytes: int = 16 * 2**20
    """Of one request's body."""

    all_bodies_bytes: int = 256 * 2**20
    """Of all bodies that are being read, those up to 64 KiB not counted."""

    all_answers_bytes: int = 256 * 2**20
    """Of all answers that are being sent, those up to 64 KiB not counted."""

    header_bytes: int = 8192
    """Of the request line and headers together; the framework takes no more than 16384."""

    connections: int = 4096
    """Open at once. For one more the longest idle one is closed; if none is idle, it is refused."""

    idle_s: float = 75
    """Until a connection without a request is closed."""

    receive_s: float = 60
    """For the headers of a request to arrive, and for its body."""

    send_s: float = 60
    """For a client to take what is sent before its request is cancelled."""

    unread_tokens: int = 1024
    """That a stream may be ahead of what its client has taken, beyond buffers, before it is cancelled."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            most = 16384 if name == "header_bytes" else math.inf
            if not 0 < value <= most or value == math.inf:
                bound = f" and at most {most}" if most < math.inf else ""
                raise ConfigError(f"--limit {name} must be positive{bound}, got {value:g}")


def parse_limits(texts: Iterable[str]) -> Limits:
    """Limits from `name=value` texts. Raises: `ConfigError`."""
    kinds = {field.name: float if field.name.endswith("_s") else int for field in dataclasses.fields(Limits)}
    values: dict[str, float] = {}
    for text in texts:
        name, is_given, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(kinds)}"
            raise ConfigError(f"--limit: no limit is called {name!r}; {hint}")
        try:
            values[name] = kinds[name](value)
        except ValueError:
            shown = value if is_given else text
            raise ConfigError(f"--limit {name} expects a number after =, got {shown!r}") from None
    return Limits(**values)  # type: ignore[arg-type]
