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

import psutil

START_S = 300.0
_POLL_S = 0.02
_MOST_LOG_BYTES = 1 << 26
_LISTENING = re.compile(r"listening on (http://\S+?),")
_LAST_WORDS = re.compile(
    r"served (\d+) tokens .*: ([\d.]+) s in the model, ([\d.]+) s around it; ([\d.]+) s of CPU time"
)


@dataclasses.dataclass(frozen=True)
class CpuTime:
    """CPU seconds so far, user and system: of the process that speaks HTTP, and of the engine's."""

    http_s: float
    engine_s: float

    def __sub__(self, earlier: CpuTime) -> CpuTime:
        return CpuTime(self.http_s - earlier.http_s, self.engine_s - earlier.engine_s)


class OwnServer:
    """`python -m engine.server` with `argv`, on a free port.

    At its end it says how long the engine's thread was in the model and awake outside of it, by the clock,
    and its CPU time. What is outside of the model is reckoned by its part of the clock's time: too much on
    a machine without a free core, where whoever gets a message takes the core of its sender.
    """

    model = "default"

    def __init__(self, argv: Sequence[str]) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (open as long as this object)
        command = [sys.executable, "-m", "engine.server", "--port", "0", *argv]
        self._process = subprocess.Popen(command, stderr=self._log)
        self._watched = psutil.Process(self._process.pid)
        self._wait(lambda: _LISTENING.search(self._text()))
        self.base_url = _LISTENING.search(self._text())[1]
        self._wait(self._is_ready)

    def cpu_time(self) -> CpuTime:
        children = self._watched.children(recursive=True)
        return CpuTime(_cpu_s(self._watched), sum(map(_cpu_s, children)))

    def stop(self) -> float | None:
        """End it; CPU microseconds of the engine's thread outside the model, a token served."""
        self._process.terminate()
        self._process.wait(60)
        found = _LAST_WORDS.search(self._text())
        self._log.close()
        if not found or not int(found[1]):
            return None
        model_s, around_s, cpu_s = map(float, found.groups()[1:])
        return cpu_s * around_s / (model_s + around_s) / int(found[1]) * 1e6

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


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


@contextmanager
def shaped_checkpoint(shape: Path) -> Iterator[Path]:
    """A directory to be served with --load-format dummy: the given config.json, and a tokenizer for it.

    The bundled tokenizer, made as large as the vocabulary, so that every token drawn has a text.
    """
    from engine.config.model_location import bundled_model

    config = json.loads(shape.read_text())
    bundled = Path(bundled_model())
    tokenizer = json.loads((bundled / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first = 1 + max([*vocab.values(), *(token["id"] for token in tokenizer["added_tokens"])])
    vocab.update({f"<{token_id}>": token_id for token_id in range(first, config["vocab_size"])})
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        (directory / "config.json").write_text(json.dumps(config))
        (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
        for name in ("tokenizer_config.json", "generation_config.json"):
            (directory / name).write_text((bundled / name).read_text())
        yield directory
