"""The channel between a gateway and its successor: a Unix socket that carries messages, and open
files with them (SCM_RIGHTS).

A frame is a head (the length of the message in bytes, and the number of files that come with it)
and the message as MessagePack.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import struct
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from redbtc.handover.messages import HandoverMessage

FRAME_HEAD = struct.Struct("!IH")
MAX_FILES = 200  # in one message; Linux takes 253
READ_BYTES = 256 << 10


class ChannelClosed(Exception):
    """The other process has closed the channel, or has ended."""


class Channel:
    """One end of the channel. One task may receive; several may send."""

    def __init__(self, end: socket.socket, unread: bytes = b"", files: Iterable[int] = ()) -> None:
        """`unread` and `files` were received from `end` before, and belong to no whole message."""
        self.socket = end
        self._loop = asyncio.get_running_loop()
        self._received = bytearray(unread)
        self._files = deque(files)
        self._sending = asyncio.Lock()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(HandoverMessage)
        end.setblocking(False)

    async def send(self, message: HandoverMessage, files: Sequence[int] = ()) -> None:
        """Send a message with at most MAX_FILES open files, which stay open here. Raises
        ChannelClosed."""
        frame = bytearray(FRAME_HEAD.size)
        self._encoder.encode_into(message, frame, FRAME_HEAD.size)  # a body is copied only once
        FRAME_HEAD.pack_into(frame, 0, len(frame) - FRAME_HEAD.size, len(files))
        data = memoryview(frame)
        async with self._sending:
            try:
                while files:
                    await self._until_ready(self._loop.add_writer, self._loop.remove_writer)
                    with contextlib.suppress(BlockingIOError):
                        data = data[socket.send_fds(self.socket, [data], files) :]
                        files = ()
                if data:
                    await self._loop.sock_sendall(self.socket, data)
            except OSError:
                raise ChannelClosed from None

    async def receive(self) -> tuple[Any, list[int]]:
        """Return the next message and the files that came with it, for the caller to close. Files
        are missing at the end if this process has reached its limit of open files. Raises
        ChannelClosed."""
        while (found := self.take()) is None:
            await self.fill()
        return found

    async def fill(self) -> None:
        """Wait for something to arrive, and keep it for `take`. Raises ChannelClosed."""
        await self._until_ready(self._loop.add_reader, self._loop.remove_reader)
        self._read()

    def take(self) -> tuple[Any, list[int]] | None:
        """Return the next message that has arrived, and its files; None if it is not whole, or is
        one that only a newer version knows."""
        if len(self._received) < FRAME_HEAD.size:
            return None
        size, count = FRAME_HEAD.unpack_from(self._received)
        end = FRAME_HEAD.size + size
        if len(self._received) < end:
            return None
        files = [self._files.popleft() for _ in range(min(count, len(self._files)))]
        try:
            message = self._decoder.decode(memoryview(self._received)[FRAME_HEAD.size : end])
        except msgspec.ValidationError:
            message = None
        del self._received[:end]
        if message is None:
            for each in files:
                os.close(each)
            return None
        return message, files

    def _read(self) -> None:
        """Read no more than the rest of a message: the files that come are those of this one."""
        missing = FRAME_HEAD.size - len(self._received)
        if missing <= 0:
            missing += FRAME_HEAD.unpack_from(self._received)[0]
        try:
            size = MAX_FILES * array.array("i").itemsize
            data, ancillary, _, _ = self.socket.recvmsg(
                min(missing, READ_BYTES), socket.CMSG_SPACE(size), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError:
            raise ChannelClosed from None
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                files = array.array("i")
                files.frombytes(content[: len(content) - len(content) % files.itemsize])
                self._files.extend(files)
        if not data:
            raise ChannelClosed
        self._received += data

    async def _until_ready(self, add: Any, remove: Any) -> None:
        ready = asyncio.Event()
        add(self.socket, ready.set)
        try:
            await ready.wait()
        finally:
            remove(self.socket)

    @property
    def unread(self) -> tuple[bytes, list[int]]:
        """The bytes and files that were received and belong to no whole message yet."""
        return bytes(self._received), list(self._files)

    def close(self) -> None:
        """Close this end, and the files that came with messages that nobody has received."""
        while self._files:
            os.close(self._files.popleft())
        self.socket.close()
