"""`python -m engine.server`: wrong input is one line and an exit code, and nothing is left running."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from engine.server.serve import _unless
from helpers.http_server import DEADLINE_S, wait_until, write_model
from helpers.server_process import ServerProcess, quiet_port, run, write_llama

DUMMY = ("--load-format", "dummy")


def complaint(process: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line, after checking that there is nothing else to be afraid of."""
    assert process.returncode == code, process.stderr
    assert "Traceback" not in process.stderr
    errors = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, process.stderr
    assert process.stdout == ""
    return errors[0].removeprefix("error: ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--modle-path", "x"], "unknown flag --modle-path; did you mean --model-path?"),
        (["--port", "99999"], "--port must be in [0, 65535], got 99999"),
        (["--page-size", "0"], "--page-size must be a multiple of 16 from 16 to 256, got 0"),
        (["--config", "missing.toml"], "cannot read --config missing.toml: No such file or directory"),
    ],
)
def test_bad_flags(argv: list[str], message: str) -> None:
    assert complaint(run(*argv), 2) == message


def test_no_such_model(tmp_path: Path) -> None:
    missing = str(tmp_path / "nothing here")
    assert complaint(run("--model-path", missing), 1) == f"no such model directory: {missing}"
    assert "has no config.json" in complaint(run("--model-path", str(tmp_path)), 1)


def test_a_hub_id_that_cannot_be_fetched() -> None:
    message = complaint(run("--model-path", "no-such-organisation/no-such-model", "--port", "0"), 1)
    assert message.startswith("no such model directory: no-such-organisation/no-such-model; as a hub id")


def test_no_tokenizer(tmp_path: Path) -> None:
    write_llama(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    message = complaint(run("--model-path", str(tmp_path), "--port", "0", *DUMMY), 1)
    assert "tokenizer.json" in message


def test_unsupported_architecture(tmp_path: Path) -> None:
    write_llama(tmp_path, architectures=["MysteryForCausalLM"], model_type="mystery")
    assert "MysteryForCausalLM" in complaint(run("--model-path", str(tmp_path), "--port", "0", *DUMMY), 1)


def test_broken_checkpoints(tmp_path: Path) -> None:
    write_llama(tmp_path)
    assert complaint(run("--model-path", str(tmp_path), "--port", "0"), 1)  # no weights
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in complaint(run("--model-path", str(tmp_path), "--port", "0"), 1)


def test_a_port_in_use(tmp_path: Path) -> None:
    write_model(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        message = complaint(run("--model-path", str(tmp_path), "--port", port), 1)
    assert message == f"cannot listen on 127.0.0.1 port {port}: Address already in use; see --host and --port"


def test_an_address_of_another_machine(tmp_path: Path) -> None:
    write_model(tmp_path)
    message = complaint(run("--model-path", str(tmp_path), "--host", "192.0.2.1", "--port", "0"), 1)
    assert message.startswith("cannot listen on 192.0.2.1 port 0: ")


def test_print_config_shows_what_would_run(tmp_path: Path) -> None:
    write_llama(tmp_path)
    (tmp_path / "server.toml").write_text("page-size = 32\n")
    process = run(
        "--model-path",
        str(tmp_path),
        "--config",
        str(tmp_path / "server.toml"),
        "--port",
        "5",
        "--print-config",
    )
    assert process.returncode == 0, process.stderr
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in process.stdout.splitlines()}
    assert lines["port"] == "5 # command line"
    assert lines["page-size"] == f"32 # {tmp_path / 'server.toml'}"
    assert lines["host"] == "127.0.0.1 # default"
    assert lines["dtype"].startswith("float32 # ")
    assert lines["context-length"].startswith("1024 # ")
    assert lines["num-threads"].split()[0].isdigit()
    assert lines["load-format"] == "safetensors # what the checkpoint is"


def test_print_config_tells_what_the_bundled_model_decides() -> None:
    process = run("--tool-call-parser", "llama3", "--print-config")
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in process.stdout.splitlines()}
    assert lines["tool-call-parser"] == "llama3 # command line"
    assert lines["reasoning-parser"] == "none # as the chat template shows"
    assert lines["pooling"] == "mean # that of the bundled model"
    default = run("--print-config").stdout
    assert re.search(r"^tool-call-parser +hermes +# as the chat template shows$", default, re.MULTILINE)


def shown_lora_paths(*flags: str) -> tuple[list[str], str]:
    """The names of the adapters that would be served, and why, as --print-config tells it."""
    process = run(*flags, "--print-config")
    assert process.returncode == 0, process.stderr
    (line,) = (line for line in process.stdout.splitlines() if line.startswith("lora-paths "))
    paths, why = line.removeprefix("lora-paths ").split("  # ")
    return [path.split("=")[0] for path in paths.strip().split(", ")], why


def test_adapters_of_the_bundled_model_and_others() -> None:
    assert shown_lora_paths() == (["pirate", "uppercase"], "those of the bundled model")
    names, why = shown_lora_paths("--lora-paths", "mine=/x", "--lora-paths", "pirate=/y")
    assert names == ["uppercase", "mine", "pirate"]
    assert why == "those of the bundled model, and command line"
    assert shown_lora_paths("--served-model-name", "uppercase")[0] == ["pirate"]


def test_a_hub_id_is_served_from_the_cache_under_its_own_name(tmp_path: Path, monkeypatch) -> None:
    """As the hub's cache lies on disk; nothing is asked of the network."""
    revision = "0" * 40
    repository = tmp_path / "models--organisation--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    write_llama(repository / "snapshots" / revision)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with ServerProcess("--model-path", "organisation/tiny", *DUMMY) as server:
        server.wait_ready()
        assert server.http.get("/v1/models").json()["data"][0]["id"] == "organisation/tiny"
        assert server.http.get("/v1/models/organisation/tiny").status_code == 200


def test_the_port_answers_while_the_model_loads_and_a_signal_ends_it_cleanly(tmp_path: Path) -> None:
    write_llama(tmp_path)
    listing = (
        "import atexit, json, sys; from engine.server.__main__ import main; "
        "atexit.register(lambda: print(json.dumps(sorted(sys.modules)))); sys.exit(main(sys.argv[1:]))"
    )
    program = [sys.executable, "-c", listing]
    for _ in range(5):
        with ServerProcess("--model-path", str(tmp_path), *DUMMY, program=program) as server:
            early = server.http.get("/health")
            if early.status_code == 200:
                continue  # the engine loaded before this test had its look
            check_start(server, early)
            return
    pytest.fail("the engine always loaded before the first look")


def check_start(server: ServerProcess, early: httpx.Response) -> None:
    assert early.status_code == 503
    assert early.json()["error"]["code"] == "model_loading"
    assert int(early.headers["retry-after"]) >= 1
    server.wait_ready()
    metrics = server.http.get("/metrics").text
    assert "engine:steps_total 1.0" in metrics, "the first step, which takes longest, was somebody's"
    assert "engine:num_requests_total 0.0" in metrics
    body = {"model": "default", "prompt": "x", "max_tokens": 4, "ignore_eos": True}
    assert server.http.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 4
    assert server.stop() == 0
    modules = set(json.loads(server.output))
    assert "engine.server.serve" in modules
    assert not modules & {"torch", "transformers", "xgrammar", "huggingface_hub"}


@contextlib.contextmanager
def streaming(server: ServerProcess, max_tokens: int) -> Iterator[Iterator[str]]:
    """The lines of a stream of exactly `max_tokens` tokens, after its first event."""
    body = {"model": "default", "prompt": "x", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        yield lines


def test_a_signal_while_loading_ends_it_cleanly(tmp_path: Path) -> None:
    write_llama(tmp_path)
    with ServerProcess("--model-path", str(tmp_path), *DUMMY) as server:
        assert server.stop() == 0
        assert "Traceback" not in server.log


def test_a_signal_in_the_turn_in_which_loading_ends_is_heeded() -> None:
    async def load() -> None:
        """Is done in one turn of the loop, as the signal is taken."""

    async def main() -> None:
        signals: asyncio.Queue[None] = asyncio.Queue()
        signals.put_nowait(None)
        assert await _unless(signals, load())
        assert not await asyncio.wait_for(_unless(signals, asyncio.sleep(3600)), DEADLINE_S)
        assert await _unless(signals, load()), "it was one signal"

    asyncio.run(main())


def test_a_signal_during_a_stream_lets_it_end(tmp_path: Path) -> None:
    write_llama(tmp_path)
    with ServerProcess("--model-path", str(tmp_path), *DUMMY) as server:
        server.wait_ready()
        with streaming(server, max_tokens=900) as lines:
            server.process.terminate()
            rest = [line for line in lines if line]
        assert '"finish_reason":"length"' in rest[-2]
        assert rest[-1] == "data: [DONE]"
        assert server.process.wait(DEADLINE_S) == 0


def test_a_second_signal_ends_running_requests_in_an_error(tmp_path: Path) -> None:
    write_llama(tmp_path, max_position_embeddings=60_000)
    with ServerProcess("--model-path", str(tmp_path), *DUMMY) as server:
        server.wait_ready()
        with streaming(server, max_tokens=50_000) as lines:
            server.process.terminate()
            wait_until(lambda: "shutting down" in server.log)
            server.process.terminate()
            rest = [line for line in lines if line]
        assert '"code":"shutting_down"' in rest[-2]
        assert rest[-1] == "data: [DONE]"
        assert server.process.wait(DEADLINE_S) == 0


def test_the_engine_is_restarted_when_it_dies(tmp_path: Path) -> None:
    write_llama(tmp_path, max_position_embeddings=60_000)
    with ServerProcess("--model-path", str(tmp_path), *DUMMY) as server:
        server.wait_ready()
        with streaming(server, max_tokens=50_000) as lines:
            server.engine.kill()
            rest = list(lines)
        assert '"code":"engine_restarted"' in rest[-4]
        assert rest[-2] == "data: [DONE]"
        server.wait_ready()
        body = {"model": "default", "prompt": "x", "max_tokens": 3, "ignore_eos": True}
        answer = server.http.post("/v1/completions", json=body)
        assert answer.json()["usage"]["completion_tokens"] == 3
        assert server.stop() == 0


def test_while_it_drains_it_says_so_and_then_frees_the_port(tmp_path: Path) -> None:
    write_llama(tmp_path, max_position_embeddings=60_000)
    argv = ("--model-path", str(tmp_path), *DUMMY, "--port", str(quiet_port()), "--drain-timeout")
    with ServerProcess(*argv, "600") as server:
        server.wait_ready()
        with streaming(server, max_tokens=50_000) as lines:
            server.process.terminate()
            wait_until(lambda: server.http.get("/health").status_code == 503)
            for path in ("/health", "/ready"):
                assert server.http.get(path).json()["error"]["code"] == "shutting_down"
            body = {"model": "default", "prompt": "x", "stream": True}
            refused = server.http.post("/v1/completions", json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert int(refused.headers["retry-after"]) >= 1
            server.process.terminate()
        assert server.process.wait(DEADLINE_S) == 0
    with ServerProcess(*argv, "0.5") as again:
        again.wait_ready()
        assert again.url == server.url
        with streaming(again, max_tokens=50_000) as lines:
            again.process.terminate()
            rest = [line for line in lines if line]
        assert '"code":"shutting_down"' in rest[-2], "after the time for draining it is ended"
        assert rest[-1] == "data: [DONE]"
        assert again.process.wait(DEADLINE_S) == 0


def test_an_engine_that_dies_again_and_again_ends_the_server(tmp_path: Path) -> None:
    write_llama(tmp_path)
    with ServerProcess("--model-path", str(tmp_path), *DUMMY) as server:
        server.wait_ready()
        killed: set[int] = set()

        def has_ended() -> bool:
            for engine in psutil.Process(server.process.pid).children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if engine.pid not in killed and engine.status() != psutil.STATUS_ZOMBIE:
                        killed.add(engine.pid)
                        engine.kill()
            return server.process.poll() is not None

        wait_until(has_ended)
        assert server.process.returncode == 1
        last = server.log.splitlines()[-1]
        assert last == "error: giving up: the engine was killed by SIGKILL 7 times in a row"
