"""The server under test: one of ours, started here and measured from outside, or any at an address."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

START_S = 300.0
_POLL_S = 0.02
_MOST_LOG_BYTES = 1 << 26
_LISTENING = re.compile(r"listening on (http://\S+?),")
_CPU_SECONDS = re.compile(r'engine:cpu_seconds_total{part="(\w+)"} (\S+)')


@dataclasses.dataclass(frozen=True)
class CpuTime:
    """CPU seconds so far, user and system, as the processes' own getrusage tells.

    `server_s`: of the process that speaks HTTP. `engine_s`: of the engine's process, all its threads.
    `kernels_s`: the part of that in the forward's native code, which is what runs in parallel regions: all
    of the kernels' own threads, and of the engine's thread what it spends inside of regions.
    """

    server_s: float
    engine_s: float
    kernels_s: float

    @property
    def own_s(self) -> float:
        """What is not the model's arithmetic: HTTP, text, messages, scheduling, and all Python of a step."""
        return self.server_s + self.engine_s - self.kernels_s

    def __sub__(self, earlier: CpuTime) -> CpuTime:
        return CpuTime(
            self.server_s - earlier.server_s,
            self.engine_s - earlier.engine_s,
            self.kernels_s - earlier.kernels_s,
        )

    def __add__(self, later: CpuTime) -> CpuTime:
        return CpuTime(
            self.server_s + later.server_s,
            self.engine_s + later.engine_s,
            self.kernels_s + later.kernels_s,
        )


class OwnServer:
    """`python -m engine.server` with `argv`, on a free port."""

    model = "default"

    def __init__(self, argv: Sequence[str]) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (open as long as this object)
        command = [sys.executable, "-m", "engine.server", "--port", "0", *argv]
        self._process = subprocess.Popen(command, stderr=self._log)
        self._wait(lambda: _LISTENING.search(self._text()))
        self.base_url = _LISTENING.search(self._text())[1]
        self._wait(self._is_ready)

    def cpu_time(self) -> CpuTime:
        with urlopen(f"{self.base_url}/metrics", timeout=START_S) as answer:
            parts = {part: float(value) for part, value in _CPU_SECONDS.findall(answer.read().decode())}
        return CpuTime(parts["server"], parts["engine"], parts["kernels"])

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(60)
        self._log.close()

    def _is_ready(self) -> bool:
        try:
            with urlopen(f"{self.base_url}/health", timeout=5) as answer:
                return answer.status == 200
        except URLError:
            return False

    def _wait(self, condition) -> None:
        deadline = time.monotonic() + START_S
        while not condition():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._process.kill()
                raise SystemExit(f"the server did not start:\n{self._text()}")
            time.sleep(_POLL_S)

    def _text(self) -> str:
        return os.pread(self._log.fileno(), _MOST_LOG_BYTES, 0).decode()  # the server writes at its own place


@contextmanager
def shaped_checkpoint(shape: Path) -> Iterator[Path]:
    """A directory to be served with --load-format dummy, as `write_shape` makes it."""
    with tempfile.TemporaryDirectory() as folder:
        write_shape(shape, Path(folder))
        yield Path(folder)


def write_shape(shape: Path, directory: Path) -> None:
    """Write a checkpoint but for its weights: the given config.json, and a tokenizer for it.

    The bundled tokenizer, made as large as the vocabulary, so that every token drawn has a text.
    """
    from engine.config.model_location import bundled_model

    config = json.loads(shape.read_text())
    bundled = Path(bundled_model())
    tokenizer = json.loads((bundled / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first = 1 + max([*vocab.values(), *(token["id"] for token in tokenizer["added_tokens"])])
    vocab.update({f"<{token_id}>": token_id for token_id in range(first, config["vocab_size"])})
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name in ("tokenizer_config.json", "generation_config.json"):
        (directory / name).write_text((bundled / name).read_text())
