"""`python -m engine.server`: read the flags, start the engine's process, serve.

The engine's process is started before anything heavy is imported here, so that both load at the
same time; the port is bound before that, so that a port in use costs nothing.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.config.adapter_source import AdapterSource
from engine.config.command_line import Settings, describe, read_settings
from engine.config.engine_config import EngineConfig
from engine.config.env import read_environment
from engine.config.model_location import (
    BUNDLED_NAME,
    BUNDLED_POOLING,
    bundled_adapters,
    bundled_model,
    check_model_path,
)
from engine.config.server_config import ServerConfig
from engine.core.process import ProcessClient
from engine.errors import CheckpointError, ConfigError
from engine.log import set_up_logging
from engine.server.model_names import ANY_NAME

EXIT_FAILURE = 1
EXIT_USAGE = 2
_BACKLOG = 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal. Returns the exit code; every error is one line on standard error."""
    try:
        settings = read_settings(sys.argv[1:] if argv is None else argv, read_environment())
        engine_config, server_config = _configs(settings)
        _ = server_config.keys  # read now, to complain now
    except ConfigError as error:
        return _complain(error, EXIT_USAGE)
    set_up_logging(server_config.log_level)
    try:
        check_model_path(engine_config.model_path)
        if engine_config.embedding_model is not None:
            check_model_path(engine_config.embedding_model)
        if settings.print_config:
            print(_explain(settings, engine_config, server_config))
        else:
            _serve(engine_config, server_config)
    except ConfigError as error:
        return _complain(error, EXIT_FAILURE)
    except KeyboardInterrupt:  # before the server listens to signals
        return EXIT_FAILURE
    return 0


def _configs(settings: Settings) -> tuple[EngineConfig, ServerConfig]:
    """Both configurations; the model is not looked for yet."""
    engine_fields, server_fields = settings.for_class(EngineConfig), settings.for_class(ServerConfig)
    if "model_path" not in engine_fields:
        engine_fields["model_path"] = str(bundled_model())
        if "embedding_model" not in engine_fields:
            engine_fields.setdefault("pooling", BUNDLED_POOLING)
        server_fields.setdefault("served_model_name", (BUNDLED_NAME,))
        names = server_fields["served_model_name"]
        server_fields["lora_paths"] = _beside_bundled(server_fields.get("lora_paths", ()), names)
    name, path = _named(engine_fields.get("embedding_model"))
    if name is not None:
        engine_fields["embedding_model"], server_fields["embedding_model_name"] = path, name
        if name in (engine_fields["model_path"], ANY_NAME):
            raise ConfigError(f"--embedding-model: {name!r:.80} is a name of the model that generates")
    return EngineConfig(**engine_fields), ServerConfig(**server_fields)


def _named(given: str | None) -> tuple[str | None, str | None]:
    """Name and path of NAME=PATH; no name where all of it is a path. Raises: `ConfigError`."""
    if given is None or "=" not in given or Path(given).exists():
        return None, given
    name, _, path = given.partition("=")
    if not name or not path:
        raise ConfigError(f"--embedding-model expects PATH or NAME=PATH, got {given!r:.200}")
    return name, path


def _beside_bundled(lora_paths: Sequence[str], model_names: Sequence[str]) -> tuple[str, ...]:
    """The bundled model's own adapters and those of --lora-paths; a name that was given means what it was
    given for."""
    taken = {*model_names, *(AdapterSource.parse(text).name for text in lora_paths)}
    own = (f"{name}={path}" for name, path in bundled_adapters().items() if name not in taken)
    return (*own, *lora_paths)


def _serve(engine_config: EngineConfig, server_config: ServerConfig) -> None:
    with _bind(server_config.host, server_config.port) as listener:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one text at a time: no pool of threads for it
        client = ProcessClient(engine_config)
        client.start()

        from engine.server.serve import serve  # late: the engine loads meanwhile

        asyncio.run(serve(client, listener, config=server_config, engine_config=engine_config))


def _bind(host: str, port: int) -> socket.socket:
    """A listening socket: from now on clients wait rather than fail. Raises `ConfigError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        reason = str(error.strerror or error).split(" (while ")[0]
        raise ConfigError(f"cannot listen on {host} port {port}: {reason}; see --host and --port") from None


def _explain(settings: Settings, engine_config: EngineConfig, server_config: ServerConfig) -> str:
    """What --print-config shows, with what the engine would decide for this model and this machine."""
    from engine.config.model_location import locate_model
    from engine.core.build_embedding import only_embeds
    from engine.core.resolve import resolve
    from engine.gguf_file import is_gguf
    from engine.models.any_model import read_any_spec

    trusts = engine_config.trust_remote_code
    directory = str(locate_model(engine_config.model_path, with_weights=False, with_code=trusts))
    resolved: dict[str, Any] = {}
    if not only_embeds(directory):
        try:
            spec = read_any_spec(directory, trusts_remote_code=trusts)
        except CheckpointError:  # what a quantised one stores in which form is told by its weights alone
            directory = str(locate_model(engine_config.model_path, with_code=trusts))
            spec = read_any_spec(directory, trusts_remote_code=trusts)
        resolved = resolve(engine_config, spec).explained() | _explained_formats(directory, server_config)
    if engine_config.load_format == "auto":
        held = "gguf" if is_gguf(directory) else "safetensors"
        resolved["load_format"] = (held, "what the checkpoint is")
    if settings.get("pooling") is None and engine_config.pooling is not None:
        resolved["pooling"] = (engine_config.pooling, "that of the bundled model")
    if settings.get("model_path") is None:
        resolved["model_path"] = (engine_config.model_path, "the bundled model")
    if settings.get("served_model_name") is None:
        own_name = server_config.served_model_name
        why = "the name of the bundled model" if own_name else "the model path"
        resolved["served_model_name"] = (own_name or (engine_config.model_path,), why)
    if settings.get("model_path") is None:
        others = settings.chosen.get("lora_paths")
        why = "those of the bundled model" + (f", and {others.source}" if others else "")
        resolved["lora_paths"] = (server_config.lora_paths, why)
    return describe(settings, resolved)


def _explained_formats(directory: str, config: ServerConfig) -> dict[str, tuple[str, str]]:
    """The formats that a model's chat template shows, where they were left to it."""
    from engine.server.model_files import ModelFiles

    formats = ModelFiles.load(
        directory,
        sampling_defaults=config.sampling_defaults,
        preferred_sampling=config.preferred_sampling,
        chat_template_file=config.chat_template,
    ).formats
    found = {"tool_call_parser": formats.tools, "reasoning_parser": formats.thoughts}
    return {
        name: ("none" if format is None else format.name, "as the chat template shows")
        for name, format in found.items()
        if getattr(config, name) == "auto"
    }


def _complain(error: ConfigError, code: int) -> int:
    print(f"error: {error.message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
