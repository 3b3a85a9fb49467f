"""How many connections fit under the system's limits on open files, with limits of a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, resource, sys
from engine.server.open_files import room_for
soft, hard, wanted = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
room = room_for(wanted)
print(json.dumps([room.connections, room.backlog, *resource.getrlimit(resource.RLIMIT_NOFILE)]))
"""


def room(soft: int, hard: int, wanted: int) -> list[int]:
    """Connections, backlog, and the limits afterwards."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    argv = [sys.executable, "-c", PROGRAM, *map(str, (soft, hard, wanted))]
    return json.loads(subprocess.run(argv, env=environment, check=True, capture_output=True).stdout)


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "expected"),
    [
        (1024, 4000, 2048, [2048, 1024, 3200, 4000]),  # raised by what it takes
        (3500, 4000, 2048, [2048, 1024, 3500, 4000]),  # enough as it is
        (256, 4096, 4096, [2976, 992, 4096, 4096]),  # all that there is, and fewer connections
        (256, 256, 4096, [96, 32, 256, 256]),
        (64, 64, 4096, [24, 8, 64, 64]),
        (1024, 4000, 4, [4, 1024, 1156, 4000]),
    ],
)
def test_the_limit_is_raised_or_the_connections_are_fewer(
    soft: int, hard: int, wanted: int, expected: list[int]
) -> None:
    got = room(soft, hard, wanted)
    assert got == expected
    connections, backlog, limit, _ = got
    assert connections + backlog < limit
