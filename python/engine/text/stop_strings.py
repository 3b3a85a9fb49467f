"""Where a text must end: stop strings, found as the text arrives."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence

from engine.errors import InvalidRequest

MAX_STOP_CHARS = 8192


class StopStrings:
    """Passes text through until a stop string appears in it.

    The match is the one that starts first, the longest of those, whatever chunks the text comes
    in; text that may still become part of it is held back, so nothing is ever given out that the
    match takes away. When one stop string begins another, or overlaps it, a complete match can
    have to wait for more text: `matched` is set once it is certain, at the latest by `finish`.

    `include_stop` puts the matched string at the end of the text given out.

    Cost: linear in the text, whatever the stop strings (Aho and Corasick 1975).
    Raises: `InvalidRequest` if the stop strings together exceed `MAX_STOP_CHARS`, or one is empty.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        self.matched: str | None = None
        self._include_stop = include_stop
        self._trie = _Trie(stops) if stops else None
        self._node = 0
        self._held = ""
        self._match: tuple[int, int] | None = None  # start and end in `_held`, while not yet certain

    @property
    def has_any(self) -> bool:
        """Whether there is any stop string."""
        return self._trie is not None

    def twin(self) -> StopStrings:
        """One for another text; it shares the compiled strings, which are large."""
        twin = StopStrings((), self._include_stop)
        twin._trie = self._trie
        return twin

    def push(self, text: str) -> str:
        """Take more text; returns what is safe to give out. After a match: nothing."""
        if self._trie is None or not text:
            return text
        if self.matched is not None:
            return ""
        text, num_scanned = self._held + text, len(self._held)
        held_from = self._scan(text, num_scanned)
        if self._match is not None and held_from > self._match[0]:
            return self._end_at_match(text)
        self._held = text[held_from:]
        if self._match is not None:
            start, end = self._match
            self._match = (start - held_from, end - held_from)
        return text[:held_from]

    def finish(self) -> str:
        """The text has ended: returns what was held back, up to a match if there is one."""
        if self._match is not None:
            return self._end_at_match(self._held)
        held, self._held = self._held, ""
        return held

    def _scan(self, text: str, position: int) -> int:
        """Read on from `position`. Returns where the text begins that has to wait."""
        trie, node = self._trie, self._node
        while position < len(text):
            if node == 0:
                # Most text begins no stop string: skip to the next character that does.
                found = trie.first_chars.search(text, position)
                if found is None:
                    position = len(text)
                    break
                position = found.start()
            node = trie.step(node, text[position])
            position += 1
            length = trie.longest_match[node]
            if length:
                self._note_match(position - length, position)
            if self._match is not None and position - trie.open_depth[node] > self._match[0]:
                break
        self._node = node
        return position - trie.open_depth[node]

    def _note_match(self, start: int, end: int) -> None:
        # Ends only grow, so at the same start the newer match is the longer one.
        if self._match is None or start <= self._match[0]:
            self._match = (start, end)

    def _end_at_match(self, text: str) -> str:
        start, end = self._match
        self.matched = text[start:end]
        self._held, self._match = "", None
        return text[: end if self._include_stop else start]


class _Trie:
    """All stop strings as an automaton. Node 0 is the root.

    For the longest suffix of the text that begins a stop string, node by node: `longest_match` is
    the length of the longest stop string that ends here (0: none), `open_depth` that of the
    longest suffix which more text could turn into a stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise InvalidRequest("Invalid request: stop strings must not be empty", param="stop")
        num_chars = sum(map(len, stops))
        if num_chars > MAX_STOP_CHARS:
            message = (
                f"Invalid request: stop strings have {num_chars} characters, at most {MAX_STOP_CHARS} allowed"
            )
            raise InvalidRequest(message, param="stop")
        self.first_chars = re.compile("[" + re.escape("".join({stop[0] for stop in stops})) + "]")
        self._children: list[dict[str, int]] = [{}]
        self._fallback = [0]
        self.longest_match = [0]
        self.open_depth = [0]
        for stop in stops:
            self._insert(stop)
        self._link()

    def step(self, node: int, char: str) -> int:
        """The node after one more character."""
        while (child := self._children[node].get(char)) is None:
            if node == 0:
                return 0
            node = self._fallback[node]
        return child

    def _insert(self, stop: str) -> None:
        node = 0
        for depth, char in enumerate(stop, 1):
            child = self._children[node].get(char)
            if child is None:
                child = self._children[node][char] = len(self._children)
                self._children.append({})
                self._fallback.append(0)
                self.longest_match.append(0)
                self.open_depth.append(depth)
            node = child
        self.longest_match[node] = len(stop)

    def _link(self) -> None:
        """Set fallbacks breadth first, so that a node's own fallback is complete before the node."""
        queue = deque(self._children[0].values())
        while queue:
            node = queue.popleft()
            fallback = self._fallback[node]
            if not self.longest_match[node]:
                self.longest_match[node] = self.longest_match[fallback]
            if not self._children[node]:
                self.open_depth[node] = self.open_depth[fallback]
            for char, child in self._children[node].items():
                if node != 0:
                    self._fallback[child] = self.step(fallback, char)
                queue.append(child)
