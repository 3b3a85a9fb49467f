"""Which requests are blamed for the death of the engine, and what becomes of them."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys

import msgspec
import pytest

from engine._native import ExecutionContext, ProgressBoard
from engine.core.client import EngineState
from engine.core.step_board import StepBoard
from engine.core.suspects import Suspects
from engine.errors import InvalidRequest, Overloaded
from helpers import fake_engine_process as fake
from unit.test_process import DEADLINE_S, generate, run, running, tokens_of, until

FAULTS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT)


async def outcome(client, request):
    """Its tokens, or the code of its error."""
    try:
        return await tokens_of(await client.submit(request))
    except (Overloaded, InvalidRequest) as error:
        return error.slug


def test_a_request_that_crashes_the_engine_is_found_and_refused(caplog):
    """Those that shared its step are tried again one by one, and are cleared."""

    async def main():
        async with running() as client:
            await client.wait_ready()
            prompts = {"bad": [fake.CRASHES, 1], "a": [1, 2, 3], "b": [4, 5, 6]}
            first = await asyncio.gather(*(outcome(client, generate(k, p)) for k, p in prompts.items()))
            assert first == ["engine_restarted"] * 3
            await client.wait_ready()
            # Innocent ones beside each other; nobody runs with them, and they end as ever.
            again = await asyncio.gather(*(outcome(client, generate(k, prompts[k])) for k in "ab"))
            assert [len(tokens) for tokens in again] == [8, 8]
            assert not any(client._suspects.check(generate(k, prompts[k])).runs_alone for k in "ab")
            assert await outcome(client, generate("other id", prompts["bad"])) == "engine_restarted"
            await client.wait_ready()
            pid = client.pid
            for seed in (None, None):
                refused = await outcome(client, generate("third", prompts["bad"], seed=seed))
                assert refused == "request_crashes_engine"
            assert len(await outcome(client, generate("like it", [fake.SLOW, 1]))) == 8
            assert client.pid == pid and client.num_restarts == 2

    run(main)
    assert "other id crashes the engine and is refused" in caplog.text


def test_how_a_suspect_is_cleared_and_how_not():
    """It must have been computed, alone: then its client may end it. Having waited proves nothing."""

    async def main():
        async with running() as client:
            await client.wait_ready()
            prompt = [fake.SLOW, 7]

            def ask(request_id):
                return generate(request_id, prompt, max_tokens=900)

            def is_suspected():
                return client._suspects.check(ask("look")).runs_alone

            def suspect():
                client._suspects.note_death([ask("x"), generate("y", [1])])
                assert is_suspected()

            for end in (client.cancel, lambda request_id: client.cancel_choice(request_id, 0)):
                suspect()
                stream = await client.submit(ask("a"))
                await anext(aiter(stream))
                assert is_suspected(), "it is not through"
                end("a")
                assert not is_suspected()
            suspect()
            busy = [await client.submit(generate(f"b{i}", [fake.SLOW], max_tokens=900)) for i in range(4)]
            waiting = asyncio.create_task(client.submit(ask("waits")))
            await until(lambda: len(client._streams) == 5)
            client.cancel("waits")
            with pytest.raises(InvalidRequest):
                await waiting
            assert is_suspected(), "it never ran"
            with pytest.raises(InvalidRequest):
                await client.submit(ask("b0"))  # the id is in use
            assert is_suspected() and len(busy) == 4

    run(main)


@pytest.mark.parametrize("number", [signal.SIGKILL, *FAULTS])
def test_a_kill_from_outside_makes_no_suspects(number):
    async def main():
        async with running() as client:
            await client.wait_ready()
            stream = await client.submit(generate("a", [fake.SLOW], max_tokens=900))
            await anext(aiter(stream))
            os.kill(client.pid, number)
            with pytest.raises(Overloaded):
                await tokens_of(stream)
            assert number.name in client.state_reason
            assert not client._suspects._suspected

    run(main)


def test_a_kill_by_the_watchdog_makes_no_suspects():
    async def main():
        async with running(watchdog_timeout=2) as client:
            await client.wait_ready()
            assert await outcome(client, generate("a", [fake.HANGS])) == "engine_restarted"
            assert "made no progress for" in client.state_reason
            await client.wait_ready()
            assert not client._suspects._suspected

    run(main)


def test_an_idle_engine_that_is_stopped_is_found_out():
    async def main():
        async with running(watchdog_timeout=2) as client:
            await client.wait_ready()
            pid = client.pid
            os.kill(pid, signal.SIGSTOP)
            await until(lambda: client.state is not EngineState.READY)
            await client.wait_ready()
            assert client.pid != pid

    run(main)


def test_an_engine_that_is_stopped_while_it_loads_is_found_out():
    """Not as late as one that may only be slow to load."""

    async def main():
        async with running("slow", watchdog_timeout=1) as client:
            client.attach()
            await until(lambda: "loading weights" in client.state_reason)
            pid = client.pid
            os.kill(pid, signal.SIGSTOP)
            await until(lambda: client.pid != pid)
            assert client.state is EngineState.LOADING and client.num_restarts == 1

    run(main)


def test_a_death_is_seen_although_somebody_holds_the_connection_open():
    """A grandchild may have inherited the engine's end of the socket."""

    async def main():
        async with running() as client:
            await client.wait_ready()
            with contextlib.ExitStack() as stack:
                for name in os.listdir(f"/proc/{client.pid}/fd"):
                    fd = await asyncio.to_thread(_steal, client.pid, int(name))
                    if fd is not None:
                        stack.callback(os.close, fd)
                stream = await client.submit(generate("a", [fake.SLOW], max_tokens=900))
                os.kill(client.pid, signal.SIGKILL)
                with pytest.raises(Overloaded):
                    await asyncio.wait_for(tokens_of(stream), DEADLINE_S)

    run(main)


def _steal(pid, fd):
    """A copy of another process's descriptor (pidfd_getfd), where the system lets us."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(pid)
    try:
        copy = libc.syscall(438, pidfd, fd, 0)
    finally:
        os.close(pidfd)
    return copy if copy >= 0 else None


def test_suspects_are_known_by_what_they_ask():
    suspects = Suspects()
    request = msgspec.structs.replace(generate("a", [1, 2], temperature=0.5), trace_id="t1", client="k")
    assert suspects.check(request) is request
    suspects.note_death([request, generate("b", [3])])
    alone = suspects.check(generate("c", [1, 2], temperature=0.5))
    assert alone.runs_alone
    assert not suspects.check(generate("c", [1, 2], temperature=0.6)).runs_alone
    suspects.note_death([alone, generate("d", [4])])  # not its fault alone: it stays a suspect
    assert suspects.check(request).runs_alone
    suspects.note_death([alone])
    with pytest.raises(InvalidRequest) as caught:
        suspects.check(request)
    assert caught.value.slug == "request_crashes_engine"
    suspects.note_end(suspects.check(generate("e", [3])))
    assert not suspects.check(generate("e", [3])).runs_alone


def test_native_ops_are_counted_on_the_board():
    import torch

    from engine.ops import native

    board = StepBoard()
    context = ExecutionContext(2)
    view = ProgressBoard(board.fd)
    context.report_to(view)
    x = torch.zeros(3, 8)
    before = board.progress
    for _ in range(5):
        native.rms_norm(context, x, torch.ones(8), 1e-5, torch.empty(3, 8))
    assert board.progress[0] - before[0] == view.num_ops == 5
    del view, context
    board.close()


PROGRAM = """
import ctypes, mmap, os, platform, signal, sys, tempfile
from engine._native import ProgressBoard
from engine.core.step_board import StepBoard

def run(code):
    if platform.machine() != "x86_64":
        signal.raise_signal(getattr(signal, how))
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(bytes.fromhex(code))
    ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()

def read_behind_a_file():
    file = tempfile.TemporaryFile()
    file.truncate(mmap.PAGESIZE)
    page = mmap.mmap(file.fileno(), mmap.PAGESIZE)
    file.truncate(0)
    page[0]

board = StepBoard(int(sys.argv[1]))
ProgressBoard(board.fd).note_faults()
board.begin_step(["r1", "r2"])
how = sys.argv[2]
match how:
    case "SIGSEGV": ctypes.string_at(0)
    case "SIGBUS": read_behind_a_file()
    case "SIGILL": run("0f0b")  # ud2
    case "SIGFPE": run("31c931d2f7f9")  # xor ecx, ecx; xor edx, edx; idiv ecx
    case "SIGABRT": os.abort()
print(flush=True)
signal.pause()
"""


@pytest.mark.parametrize("number", FAULTS)
@pytest.mark.parametrize("is_outside", [False, True])
def test_faults_of_ones_own_are_told_from_signals(number, is_outside):
    board = StepBoard()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(board.fd), "none" if is_outside else number.name],
        pass_fds=[board.fd],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
    )
    with process:
        if is_outside:
            process.stdout.readline()
            os.kill(process.pid, number)
    assert process.returncode == -number
    assert board.has_outside_fault is is_outside
    assert board.step_request_ids == ["r1", "r2"]
    board.end_step()
    assert board.step_request_ids == []
    board.close()
