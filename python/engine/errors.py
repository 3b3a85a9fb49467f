"""Every error that the engine raises on purpose.

One class per way of reacting: a caller fixes an `InvalidRequest`, waits on an `Overloaded`,
reports an `InternalError`. The HTTP status and the body belong to `server/error_map.py`; here
lives only what an error *is*. `slug` is the machine-readable word that clients match on.
"""

from __future__ import annotations


class EngineError(Exception):
    """Base of all errors raised by this package.

    `message` is one line for a human and never holds a path or a traceback of the server.
    `param` names the request field at fault, if there is one.
    """

    default_slug = "internal_error"

    def __init__(self, message: str, *, slug: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.slug = slug or self.default_slug
        self.param = param


class InvalidRequest(EngineError):
    """The request cannot be served as it is; sending it again changes nothing.

    Slugs: invalid_value, missing_required_parameter, unknown_parameter, unsupported_parameter,
    context_length_exceeded, invalid_json.
    """

    default_slug = "invalid_value"


class NotFound(EngineError):
    """The request names something that does not exist. Slugs: model_not_found, adapter_not_found."""

    default_slug = "model_not_found"


class Overloaded(EngineError):
    """The engine cannot take the request now. `retry_after_s` is the advised wait in seconds.

    Slugs: queue_full, queue_timeout, request_timeout, slow_reader, shutting_down, model_loading,
    engine_restarted, too_many_connections, bodies_too_large, answers_too_large.
    """

    default_slug = "queue_full"

    def __init__(self, message: str, *, slug: str | None = None, retry_after_s: float = 1.0) -> None:
        super().__init__(message, slug=slug)
        self.retry_after_s = retry_after_s


class InternalError(EngineError):
    """The engine is at fault."""


class DeviceLost(InternalError):
    """The GPU refuses all further work of this process, which can only end."""


class ConfigError(EngineError):
    """A flag, a configuration file or a checkpoint is wrong; the process cannot start with it."""

    default_slug = "invalid_config"


class CheckpointError(ConfigError):
    """A checkpoint is missing something, has something left over, or a tensor has the wrong shape."""

    default_slug = "invalid_checkpoint"


class NativeError(EngineError):
    """A native call was refused: a wrong argument, or a machine that lacks something."""

    default_slug = "native_error"
