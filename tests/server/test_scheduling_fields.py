"""Fields of a request that say how it is scheduled."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.http_server import Server


@pytest.mark.parametrize(
    ("given", "expected"), [(None, 0), (0, 0), (7, 7), (-3, -3), (2.0, 2), (2**31 - 1, 2**31 - 1)]
)
def test_priority_reaches_the_engine(server: Server, given: Any, expected: int) -> None:
    assert server.chat(priority=given).status_code == 200
    assert server.complete(priority=given, prompt=["a", "b"]).status_code == 200
    assert [request.priority for request in server.engine.submitted] == [expected] * 3


@pytest.mark.parametrize("given", [2**31, -(2**31), 1.5, "1", True, [1]])
def test_no_other_priority_is_taken(server: Server, given: Any) -> None:
    response = server.chat(priority=given)
    assert (response.status_code, response.json()["param"]) == (400, "priority")
