"""The serving benches: the client reads answers right and refuses wrong ones, and a whole bench runs."""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine.config.model_location import bundled_model
from helpers.http_server import DEADLINE_S
from helpers.server_process import environment

BENCH = Path(__file__).parents[2] / "bench"
HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
EVENTS = [
    {"choices": [{"index": 0, "text": "a", "finish_reason": None, "token_ids": [5]}]},
    {"choices": [{"index": 0, "text": "", "finish_reason": None}]},
    {"choices": [{"index": 0, "text": "c", "finish_reason": "length", "token_ids": [6, 7]}]},
    {"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 3}},
]


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCH / "serving"))
    import client

    return client


def stream(events: list[dict]) -> bytes:
    data = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events]
    chunks = [b"%x\r\n%b\r\n" % (len(event), event) for event in [*data, b"data: [DONE]\n\n"]]
    return HEAD + b"".join(chunks) + b"0\r\n\r\n"


def answer(client, content: bytes, piece_len: int, max_tokens: int = 3):
    pieces = [
        (float(start), content[start : start + piece_len]) for start in range(0, len(content), piece_len)
    ]
    return client.Answer(prompt_len=2, max_tokens=max_tokens, sent_s=-10.0, pieces=pieces)


@pytest.mark.parametrize("piece_len", [1, 7, 100, 10_000])
def test_an_answer_in_pieces(client, piece_len: int) -> None:
    content = stream(EVENTS)
    completion = answer(client, content, piece_len).read()
    assert completion.token_ids == [5, 6, 7]
    assert completion.num_tokens == 3
    # An event has arrived when the line end after its chunk has.
    ends = [content.index(b'"c"'), content.index(b'"a"')]
    last, first = (content.index(b"\n\n\r\n", end) + 3 for end in ends)
    assert completion.text_s == [float(at // piece_len * piece_len) for at in (first, last)]
    assert completion.ttft_s == completion.text_s[0] + 10


def test_tokens_that_all_come_at_once_have_no_rate(client) -> None:
    import workload

    completion = answer(client, stream(EVENTS), 10_000).read()
    figures = workload.figures_of([completion], 2.0, 0.1, None)
    assert "decode_tok_s" not in figures
    assert (figures["output_tok_s"], figures["itl_p50_ms"]) == (1.5, 0)


@pytest.mark.parametrize("piece_len", [1, 100, 10_000])
def test_an_answer_of_known_length(client, piece_len: int) -> None:
    body = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in EVENTS)
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body)
    assert answer(client, head + body, piece_len).read().token_ids == [5, 6, 7]


@pytest.mark.parametrize(
    "content",
    [
        stream(EVENTS[:-1]),
        stream([*EVENTS[:-1], {"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 2}}]),
        stream([*EVENTS[:-1], {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 3}}]),
        stream([EVENTS[0], EVENTS[-1]]),
        stream([EVENTS[1], {**EVENTS[2], "choices": [{"finish_reason": "length"}]}, EVENTS[-1]]),
        stream([*EVENTS, {"error": {"message": "no"}}]),
        b"HTTP/1.1 400 Bad Request\r\ncontent-length: 2\r\n\r\n{}",
        b"",
    ],
    ids=["no usage", "fewer tokens", "another prompt", "not finished", "no text", "error", "400", "nothing"],
)
def test_a_wrong_answer_is_not_timed(client, content: bytes) -> None:
    with pytest.raises(client.BadAnswer):
        answer(client, content, 50).read()


def test_a_connection_that_was_closed_while_idle_is_not_used_again(client) -> None:
    """Servers close what is idle for long, as one server is while others take their turns."""

    async def ask_twice() -> list[int]:
        closed = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b'"prompt": [1, 2]')
            writer.write(stream(EVENTS))
            writer.close()
            closed.set()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            host, port = server.sockets[0].getsockname()
            ours = client.Client(f"http://{host}:{port}", "default")
            found = []
            for _ in range(2):
                async with asyncio.timeout(DEADLINE_S):
                    found += (await ours.complete([1, 2], 3)).read().token_ids
                await closed.wait()
                while any(connection.is_open for connection in ours._idle):
                    await asyncio.sleep(0)
            return found

    assert asyncio.run(ask_twice()) == [5, 6, 7] * 2


def run_bench(*argv: str, statuses: tuple[int, ...] = (0,)) -> dict:
    done = subprocess.run(
        [sys.executable, *argv], env=environment(), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode in statuses, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_whole_bench() -> None:
    result = run_bench(str(BENCH / "serving" / "bench_decode1.py"), "--rounds", "1")
    assert result["bench"] == "serving_decode1"
    assert (
        0 <= result["itl_p50_ms"] <= result["itl_p99_ms"] > 0
    )  # tokens that arrive at once have no time between
    assert result["decode_tok_s"] > 0 and result["client_cpu_us_per_token"] > 0
    server, engine, kernels, own = (
        result[f"{part}_cpu_us_per_token"] for part in ("server", "engine", "kernels", "own")
    )
    assert 0 < server < own < server + engine
    assert 0 < kernels < engine
    assert own == pytest.approx(server + engine - kernels)  # of one round


def test_the_bench_of_free_and_held_chats() -> None:
    result = run_bench(str(BENCH / "serving" / "bench_json.py"), "--rounds", "1")
    assert result["ratio"] == pytest.approx(result["free_us_per_token"] / result["held_us_per_token"])
    assert result["free_tokens"] == 16 * 96 > result["held_tokens"] > 16 * 20
    assert 36 <= result["prompt_tokens"] <= 44


@pytest.mark.parametrize(
    ("is_exact", "finish_reason", "is_read"),
    [(None, "stop", True), (None, "length", True), (None, "error", False), (False, "length", False)],
)
def test_an_answer_of_a_chat(client, is_exact: bool | None, finish_reason: str, is_read: bool) -> None:
    choice = {"index": 0, "delta": {"content": "a"}, "finish_reason": None}
    events = [{"choices": [choice]}, {"choices": [{**choice, "finish_reason": finish_reason}]}, EVENTS[-1]]
    chat = client.Answer(prompt_len=None, max_tokens=9, sent_s=0.0, pieces=[(1.0, stream(events))])
    if is_read:
        completion = chat.read(is_exact=is_exact)
        assert (completion.prompt_len, completion.num_tokens) == (2, 3)
    else:
        with pytest.raises(client.BadAnswer):
            chat.read(is_exact=is_exact)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("structured", ["at_once_ratio", "one_by_one_ratio", "at_once_forced_share"]),
        ("speculative", ["echo1_ratio", "chat8_ratio", "other8_cpu_ratio"]),
    ],
)
def test_a_bench_of_servers_in_turns(name: str, figures: list[str]) -> None:
    argv = [str(BENCH / "serving" / f"bench_{name}.py"), "--rounds", "1"]
    result = run_bench(*argv, statuses=(0, 1))  # on a busy machine a demand may be missed
    assert all(result[figure] > 0 for figure in figures)
    at_most = {"at_once ratio": 1.0, "one_by_one ratio": 1.05}
    at_least = {"echo1 ratio": 1.5, "other1 ratio": 0.97, "other8 ratio": 0.97}
    found = {label: result[label.replace(" ", "_")] for label in result["demands"]}
    if name == "structured":
        assert result["demands"] == {label: found[label] <= most for label, most in at_most.items()}
    else:
        assert result["demands"] == {label: found[label] >= least for label, least in at_least.items()}


@pytest.mark.parametrize(("most_us", "status"), [(1e9, 0), (0, 1)])
def test_a_kernel_bench_that_misses_its_bound_fails(monkeypatch, capsys, most_us: float, status: int) -> None:
    for directory in (BENCH, BENCH / "kernels"):
        monkeypatch.syspath_prepend(str(directory))
    import bench_boundary

    monkeypatch.setattr(bench_boundary, "MOST_US", most_us)
    monkeypatch.setattr(sys, "argv", ["bench_boundary.py"])
    assert bench_boundary.main() == status
    five = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]["five tensors"]
    assert five["reached"] is (status == 0) and five["us"] > 0 and five["spread"] >= 0


def test_every_op_of_rows_has_its_share_of_the_limit(monkeypatch, capsys) -> None:
    for directory in (BENCH, BENCH / "kernels"):
        monkeypatch.syspath_prepend(str(directory))
    import bench_rows

    for name, value in {"VOCAB": 2000, "COLD_BYTES": 1_000_000}.items():
        monkeypatch.setattr(bench_rows, name, value)
    monkeypatch.setattr(sys, "argv", ["bench_rows.py", "--threads", "1", "--repeats", "2"])
    bench_rows.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = {row["name"].split()[0] for row in result["ops"]}
    assert names >= {"rms_norm", "silu_mul", "rope_append_kv", "embedding", "greedy", "top-k", "top-p"}
    for row in result["ops"]:
        assert row["share"] == pytest.approx(row["gbps"] / result["read_gbps"])


@pytest.mark.parametrize(("most_us", "status"), [(1e9, 0), (0, 1)])
def test_the_cost_around_kernels(monkeypatch, capsys, most_us: float, status: int) -> None:
    """Of the bundled model, whose kernels take so little that the rest must be most of its step."""
    for directory in (BENCH, BENCH / "kernels"):
        monkeypatch.syspath_prepend(str(directory))
    import bench_step

    monkeypatch.setattr(bench_step, "SHAPE", bundled_model() / "config.json")
    monkeypatch.setattr(bench_step, "MOST_US", most_us)
    monkeypatch.setattr(sys, "argv", ["bench_step.py", "--threads", "1", "--repeats", "5"])
    assert bench_step.main() == status
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["reached"] is (status == 0)
    assert [(step["rows"], step["way"]) for step in result["steps"]] == [
        (rows, way) for rows in (1, 8, 32) for way in ("replayed", "op by op")
    ]
    for step in result["steps"]:
        assert 0.02 * step["whole_us"] < step["us"] < step["whole_us"]


@pytest.mark.parametrize(
    ("bound", "value", "status"),
    [
        ({"most": 1.05}, 1.06, 1),
        ({"most": 1.05}, 1.05, 0),
        ({"least": 1.5}, 1.49, 1),
        ({"least": 1.5}, 1.5, 0),
    ],
)
def test_servers_in_turns_that_miss_a_bound_fail(
    client, capsys, bound: dict[str, float], value: float, status: int
) -> None:
    import in_turns

    args = argparse.Namespace(shape=None, flags=[], rounds=3)
    rounds = {"echo1": [{"ratio": ratio} for ratio in (0.1, value, 9.0)]}
    assert in_turns._show("x", args, rounds, [in_turns.Demand("echo1", "ratio", **bound)]) == status
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["demands"] == {"echo1 ratio": status == 0}


def test_compare() -> None:
    command = """{python} -c 'print("{{\\"deep\\": [{value}]}}")'"""
    a, b = (command.format(python=sys.executable, value=value) for value in (6, 4))
    result = run_bench(str(BENCH / "compare_commands.py"), "--figure", "deep.0", "--rounds", "3", a, b)
    assert (result["medians"], result["ratio_of_medians"], result["ratios"]) == ([6, 4], 1.5, [1.5] * 3)
