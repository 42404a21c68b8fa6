"""A session's connection to an upstream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Literal

from websockets.asyncio.client import ClientConnection
from websockets.protocol import State

from redbtc.gateway.websocket.event_meter import is_stream_id
from redbtc.gateway.websocket.tasks import Tasks
from redbtc.meter.answers import Answer
from redbtc.request_body.pieces import Buffer
from redbtc.server.frame_reader import MAX_PART
from redbtc.slices import TURNS
from redbtc.upstream.headers import request_id_in
from redbtc.upstream.upstreams import Upstream

CLOSE_SECONDS = 2  # to close a connection, and to send the rest of a message after its answer
WRITE_LIMIT = 32 << 10  # bytes that websockets buffers before it waits for the upstream to read


SocketState = Literal[  # of a connection to an upstream
    "passing",  # its events are sent to the client as they come
    "blocked",  # one of its events waits for the client, which reads slowly
    "lost",  # nothing more that comes from it is sent to the client
    "given_up",  # lost, because its upstream has answered a message without reading all of it
]
LOST_STATES: tuple[SocketState, ...] = ("lost", "given_up")


class UpstreamSocket:
    """A session's connection to one upstream. Its `state` is changed by `enter` alone:

    passing ◄─► blocked
       └───────────┴──► lost or given_up
    """

    def __init__(
        self, upstream: Upstream, connection: ClientConnection, account_id: str, tasks: Tasks
    ) -> None:
        self.upstream = upstream
        self.connection = connection
        self.idle_seconds = upstream.settings.idle_timeout_seconds
        self.state: SocketState = "passing"
        self.cause: str | None = None  # why the upstream's side has ended it
        response = connection.response
        handshake = response.headers.raw_items() if response else ()
        self.request_id = request_id_in(  # the upstream's, of the handshake
            [(name.encode(), value.encode("utf-8", "replace")) for name, value in handshake]
        )
        # The lanes whose last request over it was sent to another member after an error.
        self.left_lanes: set[str | None] = set()
        self._account_id = account_id
        self._tasks = tasks

    def enter(self, state: SocketState) -> None:
        """Change the state. A lost connection stays lost, for the reason that came first."""
        if self.state not in LOST_STATES:
            self.state = state

    @property
    def is_lost(self) -> bool:
        """Return whether no more requests can be sent over it."""
        return self.state in LOST_STATES

    @property
    def is_open(self) -> bool:
        """Return whether a request can be sent over it now. The end of the connection can be known
        here before it is lost: what came before that is sent to the client first."""
        return not self.is_lost and self.connection.state is State.OPEN

    def may_be_of_left(self, event: Answer) -> bool:
        """Return whether an event that is no turn's can be about a request that was sent to another
        member: its client is not sent what comes from both."""
        if event.stream_id is None:
            return bool(self.left_lanes)
        return is_stream_id(event.stream_id) and event.stream_id in self.left_lanes

    async def send(self, text: Buffer, over: asyncio.Future[None] | None = None) -> bool:
        """Send a message and return True. Return False if the upstream has not read it
        CLOSE_SECONDS after `over` is done. Raises ConnectionClosed. If the caller stops waiting, a
        long text is sent on: nothing could follow a half of it."""
        if len(text) + self.connection.transport.get_write_buffer_size() <= WRITE_LIMIT:
            await self.connection.send(text, text=True)
            return True
        parts = text if len(text) <= MAX_PART else in_parts(text, self._account_id)
        sending = self._tasks.start(self.connection.send(parts, text=True))
        if over:
            await asyncio.wait({sending, over}, return_when=asyncio.FIRST_COMPLETED)
            if not (await asyncio.wait({sending}, timeout=CLOSE_SECONDS))[0]:
                return False
        await asyncio.shield(sending)
        return True

    async def send_in_time(self, text: Buffer) -> None:
        """Send a message. Raises ConnectionClosed, and closes the connection if the upstream does
        not read the message within its idle timeout."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.idle_seconds):
                await self.send(text)
                return
        self.connection.transport.abort()
        await self.connection.wait_closed()

    async def close(self) -> None:
        """Close the connection, even if the upstream does not read: websockets would wait for that
        for ever."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self.connection.close()
        self.connection.transport.abort()


async def in_parts(text: Buffer, account_id: str) -> AsyncIterator[memoryview]:
    """Iterate over the parts of a long text, in turns with other long work."""
    for at in range(0, len(text), MAX_PART):
        yield memoryview(text)[at : at + MAX_PART]
        await TURNS.wait(account_id, started=True)
