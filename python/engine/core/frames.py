"""How messages cross the socket: a 4-byte little-endian length, then one msgpack list of messages."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import msgspec

MAX_FRAME_BYTES = 256 * 1024 * 1024
HEADER = struct.Struct("<I")

_encoder = msgspec.msgpack.Encoder()


class FrameError(Exception):
    """What is no frame: sent by the other side, so that the connection is of no use any more, or ours."""


def encode_frame(messages: Sequence[msgspec.Struct]) -> bytes:
    """One frame. Raises: `FrameError` above `MAX_FRAME_BYTES`, and for what msgpack cannot hold."""
    try:
        body = _encoder.encode(messages)
    except (UnicodeEncodeError, OverflowError) as error:
        raise FrameError(f"a message does not encode: {error}") from None
    return HEADER.pack(checked_length(len(body))) + body


def checked_length(length: int) -> int:
    """`length`, if a frame may be that long. Raises: `FrameError`."""
    if length > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {length} bytes is longer than the {MAX_FRAME_BYTES} allowed")
    return length


class FrameReader:
    """Cuts a byte stream into frames and decodes them. `kind` is the union of messages expected.

    Raises: `FrameError` for a frame that is too long or does not decode.
    """

    def __init__(self, kind: object) -> None:
        self._decoder = msgspec.msgpack.Decoder(list[kind])
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[msgspec.Struct]:
        """The messages of all frames that `data` completes."""
        buffer = self._buffer
        buffer += data
        messages: list[msgspec.Struct] = []
        start = 0
        while len(buffer) - start >= HEADER.size:
            length = checked_length(HEADER.unpack_from(buffer, start)[0])
            end = start + HEADER.size + length
            if len(buffer) < end:
                break
            try:
                messages += self._decoder.decode(memoryview(buffer)[start + HEADER.size : end])
            except msgspec.MsgspecError as error:
                raise FrameError(f"a frame does not decode: {error}") from None
            start = end
        del buffer[:start]
        return messages
