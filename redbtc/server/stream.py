"""A client's connection as a stream of bytes, with flow control in both directions."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct

HIGH_WATER = 64 << 10  # bytes that wait to be parsed or taken; beyond them reading is paused


class ClientStream:
    """The bytes that have arrived and are not parsed yet, and those that are to be sent."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self.kept = b""  # bytes that have arrived and are not parsed yet
        self.writing_paused = False  # the write buffer is full, because the client reads slowly
        self.lost = False  # bytes in the write buffer were thrown away
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._reading_paused = False
        self._head = b""  # a response's head, to be sent with what follows it
        self._waiting: list[asyncio.Future[None]] = []  # until more can be written

    # Reading

    def keep(self, data: bytes, pause: bool) -> None:
        """Keep bytes to parse them later. Stop reading from the socket meanwhile if `pause` is true
        or there are more than HIGH_WATER."""
        self.kept = data
        if pause or len(data) > HIGH_WATER:
            self.pause_reading()

    def take_kept(self) -> bytes:
        """Return the bytes that were kept, which are to be parsed now."""
        data, self.kept = self.kept, b""
        return data

    def pause_reading(self) -> None:
        """Stop reading from the socket."""
        if not self._reading_paused:
            self._reading_paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Read from the socket again, unless earlier bytes are still to be parsed."""
        if self._reading_paused and not self.kept:
            self._reading_paused = False
            self._transport.resume_reading()

    # Writing

    def write_head(self, head: bytes) -> None:
        """Send a response's head together with what is written in the same turn of the loop: each
        write is a system call, which costs more than most of the work on a request."""
        self._head = head
        self._loop.call_soon(self.flush_head)

    def flush_head(self) -> None:
        """Send the head if that has not been sent yet."""
        if self._head:
            head, self._head = self._head, b""
            self._transport.write(head)

    def write(self, data: bytes) -> None:
        """Send bytes, after the head if that has not been sent yet."""
        if self._head:
            head, self._head = self._head, b""
            self._transport.writelines([head, data])
        else:
            self._transport.write(data)

    def writable(self) -> asyncio.Future[None]:
        """Return a future that is done when the client has read enough for more to be written, or
        has disconnected."""
        waiting = self._loop.create_future()
        self._waiting.append(waiting)
        return waiting

    def resume_writing(self) -> None:
        """Let those who wait to write go on."""
        self.writing_paused = False
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)
        self._waiting.clear()

    @property
    def unsent_bytes(self) -> int:
        """The number of bytes in the write buffer."""
        return self._transport.get_write_buffer_size()

    @property
    def has_unsent(self) -> bool:
        """Return whether something waits to be sent."""
        return bool(self._head) or self.unsent_bytes > 0

    # Ending

    @property
    def is_closing(self) -> bool:
        """Return whether the connection is about to end."""
        return self._transport.is_closing()

    def copy(self) -> int:
        """Return an open file of the connection's socket. The connection stays open as long as the
        file is."""
        return os.dup(self._transport.get_extra_info("socket").fileno())

    def close(self) -> None:
        """Close the connection once all that is buffered has been sent."""
        self._transport.close()

    def close_writing(self) -> None:
        """Tell the client that nothing more will be sent, and go on reading."""
        with contextlib.suppress(OSError, RuntimeError, NotImplementedError):
            self._transport.write_eof()
        self.kept = b""
        self.resume_reading()

    def abort(self) -> None:
        """Close the connection at once, without sending what is buffered."""
        self.lost = self.unsent_bytes > 0
        self._transport.abort()

    def reset_when_closed(self, on: bool) -> None:
        """Set whether the connection is reset when its socket is closed. If `on`, it is reset even
        if the process is killed, so that a response that ends with the connection never looks
        complete when it is not."""
        sock = self._transport.get_extra_info("socket")
        with contextlib.suppress(OSError, AttributeError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", on, 0))

    def forget(self) -> None:
        """Drop what is kept: the connection has ended."""
        self.kept = self._head = b""
        self._reading_paused = False
        self.resume_writing()
