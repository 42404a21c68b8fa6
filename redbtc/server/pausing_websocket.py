"""The connection of a WebSocket's client: when it is read from, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from redbtc.deadlines import TICK
from redbtc.server.connections import LINGER_SECONDS
from redbtc.server.frame_reader import FrameReader

CLOSING_SECONDS = 11  # uvicorn's 10 for the client's part of closing, and one
QUIET_SECONDS = 0.25  # without bytes: the client has probably sent all that it was sending
MAX_WEBSOCKET_LINGER = 256 << 20  # bytes thrown away meanwhile; reading a message costs more


class PausingWebSocket(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket protocol, except that bytes are read from the socket only while `arrival`
    is awaited, and that frames are not parsed when they arrive: they are fed to `reader`."""

    ended = False  # no more frames are read
    _arrival: asyncio.Future[None] | None = None  # done when bytes have arrived
    _paused = False
    _heard = False  # bytes have arrived since the last ping
    _discarded = 0  # bytes that have arrived since no more frames are read

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn.max_message_size = None  # the reader bounds it
        self.conn.reader = self.reader = FrameReader()
        self.conn.parser = self.conn.parse()
        next(self.conn.parser)

    def send_keepalive_ping(self) -> None:
        self._heard = False
        super().send_keepalive_ping()

    def keepalive_timeout(self) -> None:
        """Close the connection of a client that has not answered a ping. While it sends a long
        frame it can't answer, and while it is not read its answer can't be seen: then go on
        waiting."""
        if self._heard or self._paused:
            assert self.ping_timeout is not None, "it has passed"
            self._heard = False
            self.pong_timer = self.loop.call_later(self.ping_timeout, self.keepalive_timeout)
            return
        super().keepalive_timeout()
        self.ended = self.ended or self.conn.eof_sent
        self.loop.call_later(CLOSING_SECONDS, self.transport.abort)

    def shutdown(self) -> None:
        """Close the connection, unless that has begun: a second close frame can't be sent."""
        if not self.transport.is_closing():
            super().shutdown()

    def data_received(self, data: bytes) -> None:
        if not self.handshake_initiated:  # this is the whole head
            super().data_received(data)
            if not self.handshake_initiated:  # which can't be read: nothing will answer it
                self.transport.abort()
            return
        if self.ended:
            self._discarded += len(data)
            if self._discarded > MAX_WEBSOCKET_LINGER:
                self.transport.abort()
            return
        self._heard = True
        self.reader.feed_data(data)
        if self._arrival and not self._arrival.done():
            self._arrival.set_result(None)
        elif not self._paused:
            self._paused = True
            self.transport.pause_reading()

    async def arrival(self) -> None:
        """Read from the socket, and return when bytes have arrived."""
        self._arrival = self.loop.create_future()
        self._resume()
        await self._arrival

    async def linger(self) -> None:
        """Throw away what still arrives. Once the close frame is sent, give the client
        LINGER_SECONDS to end its side, and end the sending side when nothing has arrived for
        QUIET_SECONDS: a reverse proxy can reset the connection of a client that still sends."""
        self._resume()
        while not (self.close_sent or self.transport.is_closing()):
            await asyncio.sleep(TICK)
        if self.transport.is_closing():
            return
        if self.close_timer:
            self.close_timer.cancel()
        self.close_timer = self.loop.call_later(LINGER_SECONDS, self.transport.close)
        discarded = -1
        while discarded != self._discarded:
            discarded = self._discarded
            await asyncio.sleep(QUIET_SECONDS)
        with contextlib.suppress(OSError, RuntimeError, NotImplementedError):
            self.transport.write_eof()

    def _resume(self) -> None:
        if self._paused and not self.transport.is_closing():
            self._paused = False
            self.transport.resume_reading()
