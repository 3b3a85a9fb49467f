"""`python -m engine.server` with an engine that is real but for one thing: a prompt can kill it.

A prompt that begins with the tokens `DEADLY` makes native code read where there is nothing, in the step
that computes it, so that the process dies of a segmentation fault. Runs as a script, for both processes.
"""

from __future__ import annotations

import ctypes
import functools
import sys

DEADLY = (3, 5, 3, 7, 3, 11)
COMMAND = (sys.executable, "-P", __file__)
"""-P: the other files of this folder are no libraries."""
_AS_ENGINE = "engine"


def _run_server(argv: list[str]) -> int:
    from engine.core.process import ProcessClient
    from engine.server import __main__ as server

    command = (*COMMAND, _AS_ENGINE)
    server.ProcessClient = functools.partial(ProcessClient, command=command)  # type: ignore[misc, assignment]
    return server.main(argv)


def _run_engine(argv: list[str]) -> int:
    from engine.core import engine_process
    from engine.core.build import build_engine

    def build(*args):
        core, ready = build_engine(*args)
        launch = core._runner.launch

        def launch_or_die(plan):
            for row in plan.rows:
                if tuple(row.request.token_ids[: len(DEADLY)]) == DEADLY:
                    ctypes.string_at(8)
            return launch(plan)

        core._runner.launch = launch_or_die
        return core, ready

    engine_process._build = build
    return engine_process.main(argv)


if __name__ == "__main__":
    is_engine = sys.argv[1:2] == [_AS_ENGINE]
    sys.exit(_run_engine(sys.argv[2:]) if is_engine else _run_server(sys.argv[1:]))
