"""How each engine is started on given weights: ours and the rivals that bench/compare.py measures.

An adapter turns a `Setting` into a command and an environment; `RunningEngine` starts that, waits until it
answers, stops it while another is measured, and tells its memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

START_S = 600.0
_END_S = 30.0
_POLL_S = 0.02
_MOST_LOG_CHARS = 4000
COMPLETIONS_SERVER = Path(__file__).with_name("completions_server.py")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What an engine is asked to serve. `program`: its executable, or the Python that has its packages."""

    program: str
    weights: Path
    model: str
    format: str
    port: int
    num_threads: int

    @property
    def name(self) -> str:
        """By which requests name the model."""
        return self.model


@dataclasses.dataclass(frozen=True)
class Launch:
    argv: list[str]
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One engine. `formats`: what it reads of a format, paths under the weights with {model} in them; the
    first that is there is taken.

    `program`: what is run unless the user says otherwise. `ready_path` answers 200 once it can generate.
    """

    formats: Mapping[str, tuple[str, ...]]
    launch: Callable[[Setting, str], Launch]
    program: str
    ready_path: str = "/health"

    def command(self, setting: Setting) -> Launch:
        """Raises: `SystemExit` for a format that the engine has not, and for missing weights or programs."""
        if setting.format not in self.formats:
            raise SystemExit(
                f"{setting.program} has no {setting.format} here; it has {', '.join(self.formats)}"
            )
        names = [name.format(model=setting.model) for name in self.formats[setting.format]]
        path = next((setting.weights / name for name in names if (setting.weights / name).exists()), None)
        if path is None:
            raise SystemExit(
                f"{setting.weights} has no {' or '.join(names)}; bench/README.md says how it is made"
            )
        if shutil.which(setting.program) is None:
            raise SystemExit(
                f"there is no program {setting.program}; bench/README.md says how it is installed"
            )
        return self.launch(setting, str(path))


def _own(setting: Setting, path: str) -> Launch:
    flags = {
        "bf16": ["--dtype", "bfloat16"],
        "bf16_dot": ["--quantization", "bf16_dot"],
        "int8": ["--quantization", "int8"],
        "int4": ["--quantization", "int4"],
    }
    argv = [setting.program, "-m", "engine.server", "--model-path", path, "--served-model-name", setting.name]
    argv += [
        "--port",
        str(setting.port),
        "--num-threads",
        str(setting.num_threads),
        "--context-length",
        "2048",
    ]
    return Launch([*argv, *flags[setting.format]])


def _vllm(setting: Setting, path: str) -> Launch:
    cores = sorted(os.sched_getaffinity(0))[: setting.num_threads]
    argv = [setting.program, "serve", path, "--served-model-name", setting.name, "--dtype", "bfloat16"]
    argv += [
        "--max-model-len",
        "2048",
        "--max-num-seqs",
        "32",
        "--host",
        "127.0.0.1",
        "--port",
        str(setting.port),
    ]
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "OMP_NUM_THREADS": str(setting.num_threads),
    }
    return Launch(argv, environment)


def _llama_cpp(setting: Setting, path: str) -> Launch:
    threads = str(setting.num_threads)
    argv = [setting.program, "-m", path, "--alias", setting.name, "-t", threads, "-tb", threads]
    argv += ["--parallel", "32" if setting.model == "tiny" else "16", "-c", "65536"]
    return Launch([*argv, "--host", "127.0.0.1", "--port", str(setting.port), "--no-webui"])


def _completions_server(kind: str) -> Callable[[Setting, str], Launch]:
    """An engine that is a Python package: behind our own front, with that package's Python."""

    def launch(setting: Setting, path: str) -> Launch:
        argv = [setting.program, str(COMPLETIONS_SERVER), kind, path, "--name", setting.name]
        argv += ["--port", str(setting.port), "--threads", str(setting.num_threads)]
        return Launch(argv, {"OMP_NUM_THREADS": str(setting.num_threads)})

    return launch


OWN = "engine"
ADAPTERS = {
    OWN: Adapter(dict.fromkeys(("bf16", "bf16_dot", "int8", "int4"), ("{model}",)), _own, sys.executable),
    "vllm": Adapter({"bf16": ("{model}",), "int8": ("{model}-w8a8",)}, _vllm, "vllm"),
    "llama.cpp": Adapter(
        {"bf16": ("{model}-bf16.gguf",), "int8": ("{model}-q8_0.gguf",), "int4": ("{model}-q4_0.gguf",)},
        _llama_cpp,
        "llama-server",
    ),
    "openvino": Adapter(
        {
            "bf16": ("{model}-openvino-fp16", "{model}-f16.gguf"),
            "int8": ("{model}-openvino-int8", "{model}-q8_0.gguf"),
            "int4": ("{model}-openvino-int4", "{model}-q4_0.gguf"),
        },
        _completions_server("openvino"),
        "python",
    ),
    "transformers": Adapter({"bf16": ("{model}",)}, _completions_server("transformers"), sys.executable),
}


class RunningEngine:
    """A started engine. It is stopped and continued together with all processes that it started."""

    def __init__(self, adapter: Adapter, setting: Setting) -> None:
        launch = adapter.command(setting)
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  (open as long as this object)
        began_s = time.monotonic()
        self._process = subprocess.Popen(
            launch.argv,
            env={**os.environ, **launch.environment},
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # an interrupt from the keyboard is ours to pass on
        )
        self.base_url = f"http://127.0.0.1:{setting.port}"
        self._wait_until_ready(f"{self.base_url}{adapter.ready_path}")
        self.ready_s = time.monotonic() - began_s

    def stop(self) -> None:
        """Take no time of the processor until `resume`."""
        self._signal_all(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal_all(signal.SIGCONT)

    def end(self) -> None:
        self.resume()
        everything = process_tree(self._process.pid)
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        for process_id in everything:  # what the first process left behind
            if process_tree(process_id):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process_id, signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def memory_mb(self) -> float:
        """Proportional resident memory (PSS) of all its processes now, in 10^6 bytes."""
        return sum(map(pss_bytes, process_tree(self._process.pid))) / 1e6

    def _signal_all(self, number: signal.Signals) -> None:
        for process_id in process_tree(self._process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process_id, number)

    def _wait_until_ready(self, url: str) -> None:
        deadline = time.monotonic() + START_S
        while not _answers(url):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._log.seek(0)
                log = self._log.read()[-_MOST_LOG_CHARS:]
                self.end()
                raise SystemExit(f"{self._process.args[0]} did not start:\n{log}")
            time.sleep(_POLL_S)


def free_port() -> int:
    """One that the system gives nobody who asks for any, as it may those above 32767 until it is used."""
    while True:
        port = random.randrange(15_000, 30_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except (URLError, OSError):
        return False


def process_tree(process_id: int) -> list[int]:
    """A process and all that it and its children have started, parents first; empty once it is gone."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            behind_name = status.read_text().rpartition(")")[2].split()
            children.setdefault(int(behind_name[1]), []).append(int(status.parent.name))
    tree = [process_id] if Path(f"/proc/{process_id}").exists() else []
    for parent in tree:
        tree += children.get(parent, ())
    return tree


def pss_bytes(process_id: int) -> int:
    """0 of a process that has just ended."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{process_id}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0
