"""Stop strings against a search in the whole text, for any chunking."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InvalidRequest
from engine.text.stop_strings import MAX_STOP_CHARS, StopStrings

# Two letters, so that stop strings begin, contain and overlap each other all the time.
stop_lists = st.lists(st.text("ab", min_size=1, max_size=6), max_size=5)
chunk_lists = st.lists(st.text("ab", max_size=7), max_size=12)


def first_match(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Start and stop string of the match that starts first, the longest of those."""
    found = [(text.find(stop), -len(stop), stop) for stop in stops if stop in text]
    if not found:
        return None
    start, _, stop = min(found)
    return start, stop


def longest_open_end(text: str, stops: list[str]) -> int:
    """Length of the longest end of `text` that is the beginning of a stop string, but not all of it."""
    ends = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return max(ends, default=0)


def expected_text(text: str, stops: list[str], include_stop: bool) -> tuple[str, str | None]:
    match = first_match(text, stops)
    if match is None:
        return text, None
    start, stop = match
    return text[:start] + (stop if include_stop else ""), stop


@settings(max_examples=300, deadline=None)
@given(stop_lists, chunk_lists, st.booleans())
def test_any_chunking_gives_the_text_cut_at_the_first_longest_match(stops, chunks, include_stop):
    stream = StopStrings(stops, include_stop)
    pushed = [stream.push(chunk) for chunk in chunks]
    output = "".join(pushed) + stream.finish()
    assert (output, stream.matched) == expected_text("".join(chunks), stops, include_stop)


@settings(max_examples=300, deadline=None)
@given(stop_lists, chunk_lists)
def test_text_is_held_back_only_while_it_may_become_a_stop_string(stops, chunks):
    stream = StopStrings(stops)
    seen = given_out = ""
    for chunk in chunks:
        given_out += stream.push(chunk)
        seen += chunk
        open_from = len(seen) - longest_open_end(seen, stops)
        match = first_match(seen, stops)
        if match is None:
            assert stream.matched is None
            assert given_out == seen[:open_from]
        elif open_from > match[0]:
            assert stream.matched == match[1]
            assert given_out == seen[: match[0]]
            break
        else:  # an earlier or longer match is still possible
            assert stream.matched is None
            assert given_out == seen[:open_from]


@given(st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=8), st.text(), st.booleans())
def test_any_unicode_and_any_special_character(stops, text, include_stop):
    stream = StopStrings(stops, include_stop)
    output = "".join(stream.push(char) for char in text) + stream.finish()
    assert (output, stream.matched) == expected_text(text, stops, include_stop)


def test_nothing_is_given_out_after_a_match():
    stream = StopStrings(["END"], include_stop=True)
    assert stream.push("some EN") == "some "
    assert stream.push("D and more") == "END"
    assert stream.matched == "END"
    assert stream.push("END again") == ""
    assert stream.finish() == ""
    assert stream.matched == "END"


def test_a_stop_string_that_begins_another_waits_and_finish_decides():
    stream = StopStrings(["\n", "\n\n"])
    assert stream.push("a\n") == "a"
    assert stream.matched is None
    assert stream.finish() == ""
    assert stream.matched == "\n"

    stream = StopStrings(["\n", "\n\n"], include_stop=True)
    assert stream.push("a\n") + stream.push("\n\n") == "a\n\n"
    assert stream.matched == "\n\n"


def test_text_passes_at_once_without_stop_strings():
    stream = StopStrings([])
    assert stream.push("anything") == "anything"
    assert stream.finish() == ""
    assert stream.matched is None


@pytest.mark.parametrize("stops", [["ok", ""], ["x" * (MAX_STOP_CHARS + 1)], ["x" * 512] * 17])
def test_bad_stop_strings_are_refused(stops):
    with pytest.raises(InvalidRequest) as error:
        StopStrings(stops)
    assert error.value.param == "stop"


def test_work_is_linear_for_hostile_stop_strings():
    """32 long stop strings that almost match at every position, text arriving character by character."""
    num_lookups = 0

    class CountingDict(dict):
        def get(self, key):
            nonlocal num_lookups
            num_lookups += 1
            return super().get(key)

    stream = StopStrings(["a" * (200 + i) + "b" for i in range(32)])
    stream._trie._children = [CountingDict(children) for children in stream._trie._children]
    text = ("a" * 500 + "c") * 10
    output = "".join(stream.push(char) for char in text) + stream.finish()
    assert output == text
    assert num_lookups <= 2 * len(text)
