"""A model by its hub id: fetched once, and no more of it than is read. The hub is a stand-in on loopback."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from helpers.server_process import command, environment, write_llama

COMMIT = "c" * 40
NAME = "organisation/tiny"
LOCATE = "from engine.config.model_location import locate_model; print(locate_model('organisation/tiny'))"


class Hub:
    """Serves one repository, as the hub's public interface does. `asked` are the files that were fetched."""

    def __init__(self, files: Path, cache: Path) -> None:
        self.files, self._cache = files, cache
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None: ...

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = self.path.split("?")[0]
                if path == f"/api/models/{NAME}/revision/main":
                    self.reply(json.dumps({"id": NAME, "sha": COMMIT, "siblings": []}).encode())
                elif path == f"/api/models/{NAME}/tree/{COMMIT}":
                    self.reply(json.dumps(hub.tree()).encode())
                elif path.startswith(f"/{NAME}/resolve/{COMMIT}/"):
                    hub.asked.append(path.removeprefix(f"/{NAME}/resolve/{COMMIT}/"))
                    self.reply((hub.files / hub.asked[-1]).read_bytes())
                else:
                    self.send_error(404)

            def reply(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.send_header("etag", f'"{hashlib.sha1(body).hexdigest()}"')
                self.send_header("x-repo-commit", COMMIT)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def tree(self) -> list[dict]:
        return [
            {
                "type": "file",
                "path": path.relative_to(self.files).as_posix(),
                "size": path.stat().st_size,
                "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
            }
            for path in sorted(self.files.rglob("*"))
            if path.is_file()
        ]

    def run(self, argv: list[str], **variables: str) -> str:
        """What a command prints that has this hub, and a cache of its own."""
        env = environment() | {"HF_ENDPOINT": f"http://127.0.0.1:{self._server.server_port}"}
        env |= {"HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(self._cache), "NO_PROXY": "127.0.0.1"} | variables
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    files = write_llama(tmp_path / "files")
    (files / "original").mkdir()
    for name in (
        *("model.safetensors", "consolidated.safetensors", "original/model.safetensors"),
        *("pytorch_model.bin", "modeling.py"),
    ):
        (files / name).write_bytes(b"weights")
    hub = Hub(files, tmp_path / "cache")
    yield hub
    hub.close()


def test_only_what_is_read_is_fetched_and_only_once(hub: Hub) -> None:
    shown = hub.run([*command("--model-path", NAME, "--print-config")])
    assert "context-length" in shown and "1024" in shown
    assert set(hub.asked) == {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    }
    hub.asked.clear()
    assert hub.run([*command("--model-path", NAME, "--print-config")]) == shown
    assert hub.asked == []
    # What is in the cache now is no whole checkpoint, and is not taken for one.
    directory = Path(hub.run([sys.executable, "-c", LOCATE]).strip())
    assert set(hub.asked) == {"model.safetensors"}
    assert (directory / "model.safetensors").read_bytes() == b"weights"
    assert (directory / "config.json").is_file() and not (directory / "modeling.py").exists()


CONFIGURATION = """
import transformers
from .names import NAME

class Config(transformers.LlamaConfig):
    model_type = NAME

"""
MODELING = """
import transformers
from .configuration import Config

class Model(transformers.LlamaForCausalLM):
    config_class = Config
"""
OPTIONS = "trust_remote_code=True, load_format='dummy', max_total_tokens=1024"
SCRIPT = f"from engine import LLM; LLM('organisation/tiny', {OPTIONS}).close()"
ENGINE = (
    "from engine import EngineConfig; from engine.core.build import build_engine; "
    f"build_engine(EngineConfig(model_path='organisation/tiny', {OPTIONS}))"
)


@pytest.mark.parametrize(
    "argv",
    [
        command("--model-path", NAME, "--trust-remote-code", "--print-config"),
        [sys.executable, "-c", SCRIPT],
        [sys.executable, "-c", ENGINE],
    ],
    ids=["flags", "script", "engine"],
)
def test_code_is_fetched_where_it_is_trusted(hub: Hub, tmp_path: Path, argv: list[str]) -> None:
    auto_map = {"AutoConfig": "configuration.Config", "AutoModelForCausalLM": "modeling.Model"}
    write_llama(hub.files, architectures=["Mystery"], model_type="mystery", auto_map=auto_map)
    (hub.files / "configuration.py").write_text(CONFIGURATION)
    (hub.files / "modeling.py").write_text(MODELING)
    (hub.files / "names.py").write_text("NAME = 'mystery'\n")
    hub.run([sys.executable, "-c", LOCATE])  # the cache holds all but the code
    assert not [name for name in hub.asked if name.endswith(".py")]
    hub.run(argv, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert {"configuration.py", "modeling.py", "names.py"} <= set(hub.asked)
