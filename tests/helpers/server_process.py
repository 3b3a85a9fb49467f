"""`python -m engine.server` as a process, on any free port."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

import httpx
import openai
import psutil

import engine
from helpers.http_server import DEADLINE_S, wait_until, write_model

PACKAGE_ROOT = Path(engine.__file__).parents[1]
START_S = 200

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "eos_token_id": 0,
}


def write_llama(directory: Path, **config: object) -> Path:
    """A tiny Llama to be served with --load-format dummy."""
    write_model(directory)
    (directory / "config.json").write_text(json.dumps({**LLAMA, **config}))
    return directory


def command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "engine.server", *argv]


def environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ENGINE_")}
    return inherited | {"PYTHONPATH": str(PACKAGE_ROOT), "HF_HUB_OFFLINE": "1"}


def run(*argv: str, timeout_s: float = START_S) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself."""
    return subprocess.run(
        command(*argv), env=environment(), capture_output=True, text=True, timeout=timeout_s, check=False
    )


def quiet_port() -> int:
    """A free one that the system gives nobody who asks for any: none of those above 32767."""
    while True:
        port = random.randrange(15_000, 30_000)
        with contextlib.suppress(OSError):
            socket.create_server(("127.0.0.1", port)).close()
            return port


def assert_gone(processes: list[psutil.Process]) -> None:
    """Fails the test unless they all end."""
    _, left = psutil.wait_procs(processes, DEADLINE_S)
    assert not left


class ServerProcess:
    """A served model; `log` is all that went to standard error."""

    def __init__(self, *argv: str, program: list[str] | None = None) -> None:
        self._log: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115  (open as long as this object)
        self._out: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*(program or command()), "--port", "0", *argv],
            env=environment(),
            stdout=self._out,
            stderr=self._log,
        )

    def __enter__(self) -> ServerProcess:
        try:
            wait_until(lambda: bool(self._address()) or self.process.poll() is not None, START_S)
            assert self.process.poll() is None, self.log
            self.url = self._address()
            self.http = httpx.Client(base_url=self.url, timeout=DEADLINE_S, trust_env=False)
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.stop()

    def _address(self) -> str:
        found = re.search(r"listening on (http://\S+?),", self.log)
        return found[1] if found else ""

    @property
    def log(self) -> str:
        return self._content(self._log)

    @property
    def output(self) -> str:
        return self._content(self._out)

    @staticmethod
    def _content(file: IO[str]) -> str:
        return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode()

    def wait_ready(self) -> None:
        """Fails the test with what it said when it has ended instead."""

        def is_ready() -> bool:
            assert self.process.poll() is None, self.log
            with contextlib.suppress(httpx.ConnectError):  # it ends: what it says is worth more than that
                return self.http.get("/health").status_code == 200
            return False

        wait_until(is_ready, START_S)

    def stop(self) -> int:
        """Ask it to end; the exit code. Fails the test if any child of it is left."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.terminate()
        code = self.process.wait(DEADLINE_S)
        assert_gone(children)
        return code

    @property
    def engine(self) -> psutil.Process:
        """Its engine's process, once there is one and no other child: libraries run others now and then."""
        found: list[psutil.Process] = []

        def look() -> bool:
            server = psutil.Process(self.process.pid)
            found[:] = server.children()
            with contextlib.suppress(psutil.NoSuchProcess):  # one that has just ended
                # Before it runs a program of its own, a child is a copy of its parent.
                return len(found) == 1 and found[0].cmdline() not in ([], server.cmdline())
            return False

        wait_until(look)
        return found[0]

    def sdk(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="EMPTY", max_retries=0, timeout=DEADLINE_S)
