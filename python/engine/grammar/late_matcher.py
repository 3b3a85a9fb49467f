"""xgrammar's matcher, which need not hear of every token at once."""

from __future__ import annotations

import time
from typing import Any

from engine.grammar.matcher_memory import MemoryCheck
from engine.grammar.trial import forced_text

MAX_BYTES = 2**25
"""Memory of the matcher of an answer, then the answer ends. Each byte of JSON takes 50 to 200."""
QUICK_S = 0.01
"""Time to match a token that is not counted."""
MAX_SLOW_S = 1.0
"""CPU time beyond `QUICK_S` a token that matching an answer may take, then the answer ends."""

_MOST_BEHIND = 256
"""Tokens; to hear of them at once takes the library a tenth of a millisecond within a string."""
_MOST_BEHIND_S = 0.005
"""What the library took for them before, with all that was asked of it then."""


class LateMatcher:
    """Texts that are left out for now are accepted, all together, before anything is asked.

    Some grammars take the more time and memory, the longer the answer is, and no trial before shows it. When
    matching takes too much, `excess` says of what.
    """

    __slots__ = (
        "_behind_s",
        "_is_watched",
        "_memory",
        "_num_accepted",
        "_slow_s",
        "behind",
        "excess",
        "handle",
    )

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.behind: list[bytes] = []
        """What the library has not heard of."""
        self._behind_s = 0.0
        self._num_accepted = 0
        """Tokens and texts that the library can go back over."""
        self._memory, self.excess = MemoryCheck(), ""
        self._is_watched, self._slow_s = False, 0.0

    def can_wait(self, match_s: float = 0.0) -> bool:
        """Whether a token may be left out, for which the library took so long before."""
        return len(self.behind) < _MOST_BEHIND and self._behind_s + match_s < _MOST_BEHIND_S

    def leave_out(self, text: bytes, match_s: float = 0.0) -> None:
        self.behind.append(text)
        self._behind_s += match_s

    def accept_token(self, token_id: int) -> None:
        """Raises: `RuntimeError`."""
        self.catch_up()
        if not self.handle.accept_token(token_id, False):
            raise RuntimeError(f"the grammar allows or forces token {token_id} and does not accept it")
        self._num_accepted += 1

    def accept_text(self, text: bytes) -> None:
        """Raises: `RuntimeError`."""
        self.catch_up()
        self._accept_text(text)

    def catch_up(self) -> None:
        if self.behind:
            self._accept_text(b"".join(self.behind))
            self.behind.clear()
            self._behind_s = 0.0

    def forced_text(self) -> bytes:
        """The bytes that must come next."""
        self.catch_up()
        return forced_text(self.handle)

    def fill(self, mask: Any) -> None:
        """Write the bitmask of the next token, int32 [ceil(V / 32)]."""
        self.catch_up()
        self.handle.fill_next_token_bitmask(mask, 0, False)

    def state(self) -> tuple:
        """What `go_back` needs to come back here."""
        return self._num_accepted, tuple(self.behind), self._behind_s, self.excess

    def go_back(self, state: tuple) -> bool:
        """Forget everything since `state` was given; whether there was anything."""
        num_accepted, behind, self._behind_s, self.excess = state
        num_more = self._num_accepted - num_accepted
        if num_more:
            self.handle.rollback(num_more)
            self._num_accepted = num_accepted
        if not num_more and len(self.behind) == len(behind):
            return False
        self.behind[:] = behind
        return True

    def _accept_text(self, text: bytes) -> None:
        if not self.handle.accept_string(text, False):
            raise RuntimeError(f"the grammar allows or forces {text!r} and does not accept it")
        self._num_accepted += 1

    # --- what it takes

    def start_watch(self) -> tuple[float, float]:
        """Before the library hears of a token and is asked what comes next."""
        return time.perf_counter(), time.thread_time() if self._is_watched else 0.0

    def end_watch(self, began: tuple[float, float], largest: str) -> float:
        """The seconds since. When all together were too many, there is an `excess`; `largest` is what there
        is most of in the constraint."""
        began_s, cpu_began_s = began
        if self._is_watched:
            self._slow_s += max(0.0, time.thread_time() - cpu_began_s - QUICK_S)
            if self._slow_s >= MAX_SLOW_S:
                self._end(f"takes too long to match a long answer, {MAX_SLOW_S:g} s in slow tokens", largest)
        took_s = time.perf_counter() - began_s
        if took_s > QUICK_S:
            self._is_watched = True  # from here on by CPU time, which takes microseconds to ask for
        if self._memory.spent(took_s) and self._memory.is_over(self.handle, MAX_BYTES):
            self._end(f"takes more than {MAX_BYTES >> 20} MiB of memory to match a long answer", largest)
        return took_s

    def _end(self, what: str, largest: str) -> None:
        self.excess = f"{what}; {largest}" if largest else what
