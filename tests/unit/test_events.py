"""The bytes of events."""

from __future__ import annotations

import pytest

from engine.server.sse import Events


@pytest.mark.parametrize("has_usage", [False, True])
@pytest.mark.parametrize("text", ["", "a", '"\\\n', "日本 😀", "\u2028"])
def test_more_text_is_what_text_gives_of_nothing_else(text: str, has_usage: bool) -> None:
    events = Events(object_name="o", response_id="id", created=1, model='m"', has_usage=has_usage)
    for index in (0, 12):
        assert events.more_text(index, text) == events.text(index, text)
