"""Thoughts in the messages of gpt-oss, told by tokens: how many there were, whether more may begin."""

from __future__ import annotations

from collections.abc import Callable


class ChannelTokens:
    """Follows an output. Thoughts are messages in a channel whose name begins with `NAME_START`.

    `channel_id` is the token before the name of a channel, `end_id` the one behind a message; both belong
    to the thoughts. `token_bytes` are those of a token.
    """

    NAME_START = b"a"
    """Of analysis; commentary and final are the others."""

    __slots__ = ("_channel_id", "_end_id", "_token_bytes", "is_naming", "is_thinking", "num_thoughts")

    def __init__(self, channel_id: int, end_id: int, token_bytes: Callable[[int], bytes]) -> None:
        self._channel_id, self._end_id, self._token_bytes = channel_id, end_id, token_bytes
        self.num_thoughts = 0
        """Tokens of thoughts so far."""

        self.is_thinking = False
        self.is_naming = False
        """The next token begins the name of a channel."""

    def see(self, token_id: int) -> None:
        """The output goes on with this token."""
        if token_id == self._channel_id:
            self.is_naming, self.is_thinking = True, False
        elif self.is_naming:
            self.is_naming = False
            self.is_thinking = self._token_bytes(token_id)[:1] == self.NAME_START
            self.num_thoughts += 2 * self.is_thinking
        elif self.is_thinking:
            self.num_thoughts += 1
            self.is_thinking = token_id != self._end_id

    def state(self) -> tuple[int, bool, bool]:
        """What `go_back` needs to come back here."""
        return self.num_thoughts, self.is_thinking, self.is_naming

    def go_back(self, state: tuple[int, bool, bool]) -> None:
        self.num_thoughts, self.is_thinking, self.is_naming = state
