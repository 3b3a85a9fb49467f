"""What the HTTP side is told to do."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from typing import Any

from engine.config.adapter_source import AdapterSource
from engine.config.api_keys import ApiKey, read_api_keys
from engine.config.limits import Limits, parse_limits
from engine.errors import ConfigError
from engine.log import LEVELS

SAMPLING_DEFAULTS = ("model", "openai")
ERROR_FORMATS = ("both", "flat", "openai")
TOOL_CALL_PARSERS = (
    "auto",
    "none",
    "hermes",
    "qwen25",
    "llama3",
    "mistral",
    "pythonic",
    "deepseekv3",
    "deepseekv31",
    "gpt-oss",
)
REASONING_PARSERS = ("auto", "none", "qwen3", "deepseek-r1", "mistral", "gpt-oss")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@A-Z]+")
"""As browsers send it: no path, no capitals."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Configuration of one server. Raises `ConfigError` naming the flag."""

    host: str = "127.0.0.1"
    port: int = 30000
    """0 lets the system choose; the port is then in the log."""

    served_model_name: tuple[str, ...] = ()
    """Names that requests may use; the first one is the model's id. Empty: the model path."""

    embedding_model_name: str | None = None
    """Name and id of a second model, that embeds: what --embedding-model says before =. None: its path."""

    api_key: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    """Accepted keys; without any every route is open."""

    api_key_file: str | None = None
    """TOML file of more keys: a table for each, by name."""

    admin_api_key: str | None = dataclasses.field(default=None, repr=False)
    """The only key for routes that manage the server; None: any accepted key."""

    allowed_origins: tuple[str, ...] = ()
    """Origins of web pages that may read answers, or "*" for all; empty: none."""

    allow_any_model_name: bool = False
    """Whether a name that means nothing here is answered by the model instead of 404."""

    strict_params: bool = False
    """Whether an unknown field is refused; else it is named in a header of the answer."""

    error_format: str = "both"
    """Which shapes of an error the body holds: flat, OpenAI's nested one, or both."""

    sse_keep_alive_s: float = 15.0
    """A comment is sent when a stream was silent for so long; 0: never."""

    stream_interval: int = 1
    """Tokens of a choice that an event of a stream holds, but for its first and last ones."""

    enable_cache_report: bool = False
    default_max_tokens_chat: int | None = 16
    """Limit of a chat answer when the request gives none; None: what the context leaves."""

    sampling_defaults: str = "model"
    """Where unset sampling parameters come from: the model's generation_config.json ("model"), the OpenAI API
    ("openai"), or a JSON object, and the model for those that it leaves out.
    """

    chat_template: str | None = None
    """Jinja file that takes the place of the model's own chat template."""

    tool_call_parser: str = "auto"
    """How the model writes tool calls; auto: as its chat template shows them."""

    reasoning_parser: str = "auto"
    """How the model marks its thoughts; auto: as its chat template shows."""

    queue_timeout: float = 600.0
    request_timeout: float = 0.0
    drain_timeout: float = 30.0
    """Seconds that a request waits for a running slot; that it takes in all; and that requests have to
    end when the server stops. 0: no limit for the first two, no time for the last.
    """

    limit: tuple[str, ...] = ()
    """`name=value` texts that change `limits`."""

    lora_paths: tuple[str, ...] = ()
    """Adapters to register at the start, each as PATH, NAME=PATH or a JSON object."""

    lora_dir: tuple[str, ...] = ()
    """Directories under which requests may name adapters by path."""

    log_level: str = "info"

    @functools.cached_property
    def keys(self) -> tuple[ApiKey, ...]:
        """All accepted keys. Raises: `ConfigError`, when the file cannot be read."""
        return read_api_keys(self.api_key, self.api_key_file)

    @functools.cached_property
    def preferred_sampling(self) -> dict[str, Any]:
        """What the JSON object of `sampling_defaults` holds; empty if it is none. Raises: `ConfigError`."""
        if self.sampling_defaults in SAMPLING_DEFAULTS:
            return {}
        try:
            preferred = json.loads(self.sampling_defaults)
        except (ValueError, RecursionError):
            preferred = None
        if not isinstance(preferred, dict):
            raise ConfigError(
                f"--sampling-defaults must be {' or '.join(SAMPLING_DEFAULTS)}, or a JSON object, "
                f"got {self.sampling_defaults!r:.80}"
            )
        return preferred

    @functools.cached_property
    def limits(self) -> Limits:
        return parse_limits(self.limit)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port must be in [0, 65535], got {self.port}")
        limit = self.default_max_tokens_chat
        if limit is not None and limit < 1:
            raise ConfigError(f"--default-max-tokens-chat must be at least 1, or 'context', got {limit}")
        for flag, seconds in (
            ("--queue-timeout", self.queue_timeout),
            ("--request-timeout", self.request_timeout),
            ("--drain-timeout", self.drain_timeout),
        ):
            if not 0 <= seconds < math.inf:
                raise ConfigError(f"{flag} must not be negative, got {seconds:g}")
        parse_limits(self.limit)
        _ = self.preferred_sampling
        if not 0 <= self.sse_keep_alive_s <= 86400:
            raise ConfigError(f"--sse-keep-alive-s must be in [0, 86400], got {self.sse_keep_alive_s:g}")
        if not 1 <= self.stream_interval <= 1024:
            raise ConfigError(f"--stream-interval must be in [1, 1024], got {self.stream_interval}")
        for flag, value, allowed in (
            ("--error-format", self.error_format, ERROR_FORMATS),
            ("--tool-call-parser", self.tool_call_parser, TOOL_CALL_PARSERS),
            ("--reasoning-parser", self.reasoning_parser, REASONING_PARSERS),
            ("--log-level", self.log_level, LEVELS),
        ):
            if value not in allowed:
                raise ConfigError(f"{flag} must be one of {', '.join(allowed)}, got {value!r}")
        for origin in self.allowed_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"--allowed-origins expects origins like https://example.com:8080, or *, got {origin!r}"
                )
        sources = [AdapterSource.parse(text) for text in self.lora_paths]
        if len({source.name for source in sources}) < len(sources):
            raise ConfigError("--lora-paths gives two adapters the same name")
        if any(not name for name in self.served_model_name):
            raise ConfigError("--served-model-name must not be empty")
        if self.embedding_model_name in self.served_model_name:
            raise ConfigError(
                f"--embedding-model: {self.embedding_model_name!r:.80} is a --served-model-name"
            )
        if any(not key.strip() for key in self.api_key):
            raise ConfigError("--api-key must not be empty")
        if self.admin_api_key is not None and not self.admin_api_key.strip():
            raise ConfigError("--admin-api-key must not be empty")
        if self.admin_api_key in self.api_key:
            raise ConfigError("--admin-api-key must differ from every --api-key")
