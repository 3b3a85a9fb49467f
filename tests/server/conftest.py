"""The servers under test: one in front of a scripted engine, and real ones with the bundled model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.effects import Asker
from helpers.http_server import Server, write_model
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
