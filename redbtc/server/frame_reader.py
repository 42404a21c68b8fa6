"""The buffer from which a client's WebSocket frames are parsed."""

from __future__ import annotations

import struct
from collections.abc import Generator

from websockets.exceptions import ProtocolError
from websockets.streams import StreamReader

MAX_CONTROL_BYTES = 125  # RFC 6455 §5.5
MAX_PART = 256 << 10  # bytes that are masked or unmasked in one step; a multiple of the mask's four
FIN, CONTROL, MASKED = 0x80, 0x08, 0x80  # RFC 6455 §5.2: bits of a head's first and second byte
LENGTHS = {126: 2, 127: 8}  # by the second byte of a head: the bytes in which the length follows
LONG_HEAD = 14  # bytes of a head with a length of eight bytes


class FrameReader(StreamReader):
    """The buffer of a connection's parser. It makes the parser parse one frame at each step, and
    wait while there is no room for a payload. The parser unmasks a payload in one call, so a long
    frame is presented to it as several fragments."""

    def __init__(self) -> None:
        super().__init__()
        self.max_bytes = 0  # of a message, which the frames announce
        self.message_bytes = 0  # that the frames of the current message have announced
        self.between_frames = True
        self.continues = False  # what is read is a part of a long frame, and not its first
        self.room = 0  # bytes of payload that may be read
        self.wanted = 0  # bytes of a payload that waits for room
        self.drops = False  # whether payloads are thrown away
        # Of a long frame: the first byte, the mask, and how much of it the parser has not got.
        self._first = 0
        self._mask = b""
        self._left = 0

    @property
    def too_large(self) -> bool:
        """Return whether the message has more bytes than it may have. No more of it is read."""
        return self.message_bytes > self.max_bytes

    def at_eof(self) -> Generator[None, None, bool]:
        """Return whether the stream has ended. The parser calls this before each frame. Raises
        ProtocolError for a control frame that is too long."""
        self.between_frames = not self._left
        yield
        ended = yield from super().at_eof()
        self.between_frames = False
        self.continues = self._left > 0
        if not self.continues:
            yield from self._look_at_head()
        if self._left:
            self._begin_part()
        return ended

    def _look_at_head(self) -> Generator[None, None, None]:
        """Add a frame's length to its message's. Take the head of a long frame out, once there is
        room for it. Does not end for a message that is too large."""
        while len(self.buffer) < 2:
            yield
        first, second = self.buffer[:2]
        size = second & ~MASKED
        if first & CONTROL:
            if size > MAX_CONTROL_BYTES:
                raise ProtocolError("control frame too long")
            return
        if size in LENGTHS:
            end = 2 + LENGTHS[size]
            while len(self.buffer) < end:
                yield
            size = int.from_bytes(self.buffer[2:end], "big")
        self.message_bytes += size
        while self.too_large:
            yield
        if size > MAX_PART and second & MASKED:  # else the parser refuses it
            while len(self.buffer) < LONG_HEAD:
                yield
            yield from self._wait_for_room(size)
            self._first, self._mask, self._left = first, bytes(self.buffer[10:LONG_HEAD]), size
            del self.buffer[:LONG_HEAD]

    def _begin_part(self) -> None:
        """Put the head of a fragment before the next part of a long frame."""
        size = min(self._left, MAX_PART)
        self._left -= size
        first = 0 if self.continues else self._first & ~FIN
        first |= 0 if self._left else self._first & FIN
        self.buffer[:0] = struct.pack("!BBQ", first, MASKED | 127, size) + self._mask

    def _wait_for_room(self, n: int) -> Generator[None, None, None]:
        """Wait until `n` bytes of payload may be read, or payloads are thrown away."""
        while n > self.room and not self.drops:
            self.wanted = n
            yield

    def read_exact(self, n: int) -> Generator[None, None, bytearray]:
        """Return the next `n` bytes: a part of a frame's head, or all of its payload."""
        if n > MAX_CONTROL_BYTES:
            yield from self._wait_for_room(n)
            if self.drops:
                yield from self._drop(n)
                return bytearray()
            self.room -= n
        return (yield from super().read_exact(n))

    def _drop(self, n: int) -> Generator[None, None, None]:
        """Throw the next `n` bytes away."""
        while n > len(self.buffer):
            n -= len(self.buffer)
            self.buffer.clear()
            yield
        del self.buffer[:n]
