"""The servers under test: one in front of a scripted engine, and real ones with the bundled model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.config.server_config import ServerConfig
from helpers.adapter_calls import BASE
from helpers.effects import Asker
from helpers.http_server import Server, write_adapter, write_model
from helpers.server_process import ServerProcess


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="module")
def shared_server(model_dir: Path) -> Iterator[Server]:
    with Server(model_dir) as server:
        yield server


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    """The module's server, its engine as new; afterwards nothing may be left running in it."""
    shared_server.reset()
    yield shared_server
    shared_server.wait_idle()


@pytest.fixture(scope="session")
def bundled() -> Iterator[ServerProcess]:
    """The bundled model, served without a flag."""
    with ServerProcess() as process:
        process.wait_ready()
        yield process
        assert process.stop() == 0
        assert "Traceback" not in process.log
        assert " ERROR " not in process.log, "nothing that a client sends is an error of the server"


@pytest.fixture
def ask(request: pytest.FixtureRequest, bundled: ServerProcess) -> Asker:
    """For tests with the rows of a `Table`: their path of the bundled model."""
    return Asker(bundled, request.param)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory of adapters, for `--lora-dir`."""
    root = tmp_path / "root"
    for name in ("one", "two", "deep/er"):
        write_adapter(root / name, name.encode())
    return root


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """An adapter outside of it."""
    return write_adapter(tmp_path / "outside", b"outside")


@pytest.fixture
def lora(model_dir: Path, root: Path, outside: Path) -> Iterator[Server]:
    """A server whose adapters are `first` and one that is named by its path."""
    config = ServerConfig(
        served_model_name=(BASE, "base"),
        lora_paths=(f"first={root}/one", str(outside)),
        lora_dir=(str(root),),
    )
    with Server(model_dir, config=config) as server:
        server.run(server.context.adapters.load_first())
        yield server
        server.wait_idle()
