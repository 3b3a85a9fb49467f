"""From the path in a request to a directory that may be read: nothing outside of the allowed ones."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from engine.errors import ConfigError, InvalidRequest, NotFound

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_PATH_CHARS = 4096


class AdapterRoots:
    """The directories of --lora-dir, and the single adapters of --lora-paths.

    Symbolic links are resolved before anything is compared, those of the files too.
    """

    def __init__(self, roots: Iterable[str], registered: Iterable[str]) -> None:
        self._roots = [Path(os.path.realpath(root)) for root in roots]
        for root in self._roots:
            if not root.is_dir():
                raise ConfigError(f"--lora-dir: no such directory: {root}")
        self._registered = frozenset(registered)

    def __bool__(self) -> bool:
        """Whether there is a place where requests may look for adapters."""
        return bool(self._roots)

    def find(self, path: str) -> tuple[str, tuple[int, ...]]:
        """The real directory of an adapter and a signature of its files, which changes when they do.

        A relative path is looked for in each root. Reads nothing but names and times.
        Raises: `InvalidRequest` for a path outside of the roots, `NotFound` if nothing is there.
        """
        if not 1 <= len(path) <= MAX_PATH_CHARS or "\0" in path:
            raise _refused("is no path")
        if path in self._registered:  # by the operator
            return self._checked(Path(os.path.realpath(path)), path, anywhere=True)
        candidates = [Path(path)] if os.path.isabs(path) else [root / path for root in self._roots]
        real = [Path(os.path.realpath(candidate)) for candidate in candidates]
        if not all(map(self._is_allowed, real)):
            raise _refused("is outside of the directories that --lora-dir allows")
        for directory in real:
            if os.path.isdir(directory):  # False also for names too long, where Path.is_dir raises
                return self._checked(directory, path)
        raise _not_found(path)

    def _is_allowed(self, path: Path) -> bool:
        return any(path.is_relative_to(root) for root in self._roots)

    def _checked(self, directory: Path, path: str, *, anywhere: bool = False) -> tuple[str, tuple[int, ...]]:
        signature: list[int] = []
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            real = Path(os.path.realpath(directory / name))
            if not anywhere and not self._is_allowed(real):
                raise _refused(f"has an {name} outside of the directories that --lora-dir allows")
            try:
                status = real.stat()
            except OSError:
                if name == CONFIG_FILE:
                    raise _not_found(path) from None
                continue  # the engine says what is wrong
            if not stat.S_ISREG(status.st_mode):
                raise _refused(f"has an {name} that is no regular file")
            signature += [status.st_mtime_ns, status.st_size, status.st_ino]
        return str(directory), tuple(signature)


def _refused(what: str) -> InvalidRequest:
    return InvalidRequest(f"lora_path {what}", param="lora_path")


def _not_found(path: str) -> NotFound:
    return NotFound(
        f"There is no adapter at {path[:200]!r}: no directory with an {CONFIG_FILE}.",
        slug="adapter_not_found",
        param="lora_path",
    )
