"""bench/compare.py and its adapters without any rival: commands, stopped processes, the verdict."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine import LLM, SamplingParams
from engine.config.model_location import bundled_model
from helpers.http_server import DEADLINE_S
from helpers.server_process import environment

BENCH = Path(__file__).parents[2] / "bench"
FAKE = '''
import asyncio, subprocess, sys
sys.path.insert(0, {serving!r})
from completions_server import Front

class Counting:
    """Answers 5, 6, 7, ...; told one at a time, as engines do."""
    def add(self, ids, max_tokens, emit):
        for token in range(max_tokens):
            emit([5 + token])
        emit(None)
    def decode(self, token_id):
        return chr(60 + token_id)

async def main():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    port = int(sys.argv[sys.argv.index("--port") + 1])
    server = await asyncio.start_server(Front(Counting(), "fake").serve, "127.0.0.1", port)
    async with server:
        await server.serve_forever()

asyncio.run(main())
'''


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    """The bench folder's modules, as the scripts see them."""
    monkeypatch.syspath_prepend(str(BENCH / "serving"))
    monkeypatch.syspath_prepend(str(BENCH))
    import client
    import compare
    import engines

    return type("Bench", (), {"client": client, "compare": compare, "engines": engines})


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder of weights in which every file of a rival is there, and empty."""
    folder = tmp_path / "weights"
    shutil.copytree(bundled_model(), folder / "tiny")
    for name in ("bf16.gguf", "f16.gguf", "q8_0.gguf", "q4_0.gguf", "w8a8"):
        (folder / f"tiny-{name}").touch()
    return folder


@pytest.fixture
def fake(tmp_path: Path) -> str:
    """A program that takes any flags, has a child, and completes on --port."""
    script, program = tmp_path / "fake.py", tmp_path / "fake-server"
    script.write_text(FAKE.format(serving=str(BENCH / "serving")))
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    program.chmod(0o755)
    return str(program)


def setting(bench, weights: Path, program: str, format: str = "bf16", **changes):
    facts = {"model": "tiny", "port": bench.engines.free_port(), "num_threads": 1, **changes}
    return bench.engines.Setting(program=program, weights=weights, format=format, **facts)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    "name, format, read",
    [
        ("engine", "int4", "tiny"),
        ("vllm", "bf16", "tiny"),
        ("vllm", "int8", "tiny-w8a8"),
        ("llama.cpp", "bf16", "tiny-bf16.gguf"),
        ("llama.cpp", "int8", "tiny-q8_0.gguf"),
        ("llama.cpp", "int4", "tiny-q4_0.gguf"),
        ("openvino", "bf16", "tiny-f16.gguf"),
        ("openvino", "int8", "tiny-q8_0.gguf"),
        ("transformers", "bf16", "tiny"),
    ],
)
def test_what_each_engine_is_started_with(bench, weights: Path, name: str, format: str, read: str) -> None:
    asked = setting(bench, weights, sys.executable, format, num_threads=3)
    launch = bench.engines.ADAPTERS[name].command(asked)
    assert launch.argv[0] == sys.executable
    assert str(weights / read) in launch.argv
    assert str(asked.port) in launch.argv and "tiny" in launch.argv
    assert "3" in launch.argv or launch.environment["OMP_NUM_THREADS"] == "3"


def test_an_export_comes_before_the_file_of_another_engine(bench, weights: Path) -> None:
    (weights / "tiny-openvino-int8").mkdir()
    launch = bench.engines.ADAPTERS["openvino"].command(setting(bench, weights, sys.executable, "int8"))
    assert str(weights / "tiny-openvino-int8") in launch.argv


@pytest.mark.parametrize(
    "name, format, program, said",
    [
        ("vllm", "int4", sys.executable, "has no int4"),
        ("llama.cpp", "bf16", "/nowhere/llama-server", "no program /nowhere/llama-server"),
    ],
)
def test_what_cannot_be_started(
    bench, weights: Path, name: str, format: str, program: str, said: str
) -> None:
    with pytest.raises(SystemExit, match=said):
        bench.engines.ADAPTERS[name].command(setting(bench, weights, program, format))


def test_missing_weights(bench, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"has no tiny-q8_0\.gguf"):
        bench.engines.ADAPTERS["llama.cpp"].command(setting(bench, tmp_path, sys.executable, "int8"))


def test_an_engine_that_does_not_start_shows_why(bench, weights: Path, tmp_path: Path) -> None:
    program = tmp_path / "broken"
    program.write_text("#!/bin/sh\necho no such model >&2\nexit 3\n")
    program.chmod(0o755)
    with pytest.raises(SystemExit, match="no such model"):
        bench.engines.RunningEngine(
            bench.engines.ADAPTERS["llama.cpp"], setting(bench, weights, str(program))
        )


def test_a_stopped_engine_rests_and_goes_on_with_all_its_processes(bench, weights: Path, fake: str) -> None:
    engine = bench.engines.RunningEngine(bench.engines.ADAPTERS["llama.cpp"], setting(bench, weights, fake))
    tree = bench.engines.process_tree(engine._process.pid)
    try:
        assert len(tree) == 2 and engine.memory_mb() > 1 and engine.ready_s > 0
        engine.stop()
        until(lambda: [state_of(process_id) for process_id in tree] == ["T", "T"])
        engine.resume()
        client = bench.client.Client(engine.base_url, "fake")
        completion = asyncio.run(client.complete([1, 2, 3], 4)).read()
        assert completion.token_ids == [5, 6, 7, 8]
    finally:
        engine.end()
    until(lambda: all(state_of(process_id) in ("", "Z") for process_id in tree))


def state_of(process_id: int) -> str:
    """As the kernel calls it: T for stopped, Z for one that waits to be reaped; empty once it is gone."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_the_verdict_names_the_best_rival(bench, capsys: pytest.CaptureFixture[str]) -> None:
    samples = {
        "http": {"engine": [30, 20, 40], "vllm": [10, 11, 9], "llama.cpp": [12, 20, 15]},
        "http1": {"engine": [5, 5, 5], "vllm": [1, 1, 1], "llama.cpp": [7, 4, 6]},
    }
    demand = bench.compare.Demand
    judged = bench.compare.show(
        samples,
        [
            demand("http", 2.0),
            demand("http", 3.5, ("vllm",)),
            demand("http1", 0.8),
            demand("http1", 1, ("openvino",)),
        ],
    )
    assert [(one["ratio"] or {}).get("rival") for one in judged] == ["llama.cpp", "vllm", "llama.cpp", None]
    assert judged[0]["ratio"]["value"] == 2 and judged[0]["ratio"]["rounds"] == [2.5, 1, 40 / 15]
    assert [one["holds"] for one in judged] == [True, False, True, None]
    verdicts = capsys.readouterr().out.strip().splitlines()[-4:]
    assert [line.split()[0] for line in verdicts] == ["pass", "FAIL", "pass", "open"]


BF16 = {"decode1": 1.1, "prefill": 1.6, "batch16": 1.6, "shared": 1.7, "multiturn": 1.5}
DEMANDED = {
    "bf16": BF16,
    "bf16_dot": BF16,
    "int8": {"decode1": 1.1, "prefill": 1.5, "batch16": 1.6, "shared": 1.8, "multiturn": 1.6},
    "int4": {"decode1": 1.4, "prefill": 1.8, "batch16": 1.5},
}


@pytest.mark.parametrize("name", DEMANDED)
def test_what_is_demanded_is_demanded_over_the_fast_ones(bench, name: str) -> None:
    demands = bench.compare.CASES[name].demands
    assert {demand.workload: demand.least for demand in demands} == DEMANDED[name]
    slow_only = {demand.workload: {"engine": [9.0], "transformers": [1.0]} for demand in demands}
    assert {one["holds"] for one in bench.compare.show(slow_only, demands)} == {None}
    for rival in ("vllm", "openvino", "llama.cpp"):
        samples = {d.workload: {"engine": [9.0], "transformers": [99.0], rival: [9.0]} for d in demands}
        assert [one["ratio"]["value"] for one in bench.compare.show(samples, demands)] == [1.0] * len(demands)


def test_what_is_demanded_over_http(bench) -> None:
    demands = [(d.workload, d.least, d.over) for d in bench.compare.CASES["http"].demands]
    assert demands == [("http", 3, ("vllm",)), ("http", 2, ("llama.cpp",)), ("http1", 1, ("llama.cpp",))]


def test_every_workload_that_is_demanded_is_there(bench) -> None:
    for case in bench.compare.CASES.values():
        for name in case.workloads():
            workload = bench.compare.load_workload(name)
            assert workload.name == name


def test_a_whole_comparison(weights: Path, fake: str) -> None:
    command = [sys.executable, str(BENCH / "compare.py"), "http", "--weights", str(weights), "--rounds", "2"]
    command += ["--workload", "http1", "--threads", "1", "--rival", f"llama.cpp={fake}"]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )
    last_line = done.stdout.splitlines()[-1]
    assert done.returncode in (0, 1) and last_line.startswith("{"), done.stderr
    result = json.loads(last_line)
    (demand,) = result["demands"]
    assert demand["ratio"]["rival"] == "llama.cpp"
    assert done.returncode == (0 if demand["holds"] else 1)
    assert {name: len(rounds) for name, rounds in result["samples"]["http1"].items()} == {
        "engine": 2,
        "llama.cpp": 2,
    }
    assert result["engines"]["engine"]["memory_mb"] > 100  # its second process is counted


def test_a_gguf_file_says_what_the_checkpoint_says(tmp_path: Path) -> None:
    program = (
        "import sys; from make_weights import Path, write_gguf; "
        "write_gguf(Path(sys.argv[1]), Path(sys.argv[2]), 'bf16')"
    )
    path = tmp_path / "tiny-bf16.gguf"
    paths = os.pathsep.join([environment()["PYTHONPATH"], str(BENCH / "serving"), str(BENCH)])
    subprocess.run(
        [sys.executable, "-c", program, str(bundled_model()), str(path)],
        env={**environment(), "PYTHONPATH": paths},
        check=True,
        timeout=240,
    )
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    said = [
        LLM(str(model), num_threads=1).generate([list(range(300, 340))], params)[0].outputs[0].token_ids
        for model in (bundled_model(), path)
    ]
    assert list(said[0]) == list(said[1]) and len(said[0]) == 16
