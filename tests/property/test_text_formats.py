"""Whatever a model writes: the same is found at every cut, nothing is lost, and calls are calls."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.text.formats.known import THOUGHT_FORMATS, TOOL_FORMATS
from helpers.outputs import RIGHT, TOOLS, format_named, read

FRAGMENTS = st.sampled_from(
    [
        *(marker for tools in TOOL_FORMATS.values() for marker in tools.markers),
        *(marker for thoughts in THOUGHT_FORMATS.values() for marker in thoughts.markers),
        *(text for _, text, _ in RIGHT),
        *TOOLS,
        *'{}[]()"\\:,;= \n<|',
        '{"name": "add", "arguments": ',
        '{"name": "add", "parameters": {}}',
        '"a": "x"',
        "[add(",
        "a='x'",
        "```json\n",
        "to=functions.add",
        "1e999",
        "é🙂",
    ]
)
TEXTS = st.lists(FRAGMENTS, max_size=12).map("".join)


def in_pieces(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in zip(places, places[1:], strict=False)]


@settings(max_examples=400, deadline=None)
@given(
    tools=st.sampled_from([None, *TOOL_FORMATS]),
    thoughts=st.sampled_from([None, *THOUGHT_FORMATS]),
    text=TEXTS,
    cuts=st.lists(st.integers(0, 10_000), max_size=10),
    is_open=st.booleans(),
    is_cut=st.booleans(),
)
def test_outputs(tools, thoughts, text, cuts, is_open, is_cut):
    fields = {"starts_thinking": is_open and thoughts is not None}
    output_format = format_named(tools, thoughts, **fields)
    whole = read(output_format, [text], is_cut=is_cut)
    assert read(output_format, in_pieces(text, cuts), is_cut=is_cut) == whole
    for i, (name, arguments) in enumerate(whole.calls):
        assert name in TOOLS
        if not (is_cut and i == len(whole.calls) - 1):
            assert isinstance(json.loads(arguments), dict)
    if "gpt-oss" not in (tools, thoughts) and not whole.calls and not whole.reasoning:
        marks = () if thoughts is None else THOUGHT_FORMATS[thoughts].markers
        assert whole.content.strip() == without(text, marks if is_open or marks else ()).strip() or (
            whole.content.strip() == text.strip()
        )


def without(text: str, marks: tuple[str, ...]) -> str:
    """The text without empty thoughts at its beginning."""
    for mark in marks:
        text = text.strip().removeprefix(mark)
    return text
