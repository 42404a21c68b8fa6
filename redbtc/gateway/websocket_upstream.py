"""A session's connection to an upstream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from websockets.asyncio.client import ClientConnection

from redbtc.request_body.pieces import Buffer
from redbtc.server.websocket_protocol import MAX_PART
from redbtc.slices import TURNS
from redbtc.upstream.upstreams import Upstream

if TYPE_CHECKING:
    from redbtc.gateway.websocket_session import WebSocketSession
    from redbtc.gateway.websocket_turns import Stray


LINE_SECONDS = 2  # for closing a line, and for the end of a message that is answered already
WRITE_LIMIT = 32 << 10  # bytes that websockets buffers before it waits for the upstream to read


class UpstreamSocket:
    """A session's connection to one upstream."""

    def __init__(
        self, session: WebSocketSession, upstream: Upstream, connection: ClientConnection
    ) -> None:
        self._start, self._account_id = session.start, session.account_id
        self.upstream = upstream
        self.connection = connection
        self.lost = False
        self.given_up = False
        self.waits_for_client = False  # that reads slowly
        self.strays: dict[str | None, Stray] = {}  # by lane
        self.passing: asyncio.Task[None]  # its events to the client, until it is closed

    async def send(self, text: Buffer, over: asyncio.Future[None] | None = None) -> bool:
        """Send a message and return True. Return False if the upstream has not read it LINE_SECONDS
        after `over` is done. Raises ConnectionClosed. If the caller stops waiting, a long text is
        sent on: nothing could follow a half of it."""
        if len(text) + self.connection.transport.get_write_buffer_size() <= WRITE_LIMIT:
            await self.connection.send(text, text=True)
            return True
        parts = text if len(text) <= MAX_PART else in_parts(text, self._account_id)
        sending = self._start(self.connection.send(parts, text=True))
        if over:
            await asyncio.wait({sending, over}, return_when=asyncio.FIRST_COMPLETED)
            if not (await asyncio.wait({sending}, timeout=LINE_SECONDS))[0]:
                return False
        await asyncio.shield(sending)
        return True

    async def send_within(self, text: Buffer, seconds: float) -> None:
        """Raises ConnectionClosed, also where the upstream doesn't read for so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.send(text)
                return
        self.connection.transport.abort()
        await self.connection.wait_closed()

    async def close(self) -> None:
        """Also where the upstream has stopped reading: websockets would wait for that for ever."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINE_SECONDS):
                await self.connection.close()
        self.connection.transport.abort()


async def in_parts(text: Buffer, account_id: str) -> AsyncIterator[memoryview]:
    """Iterate over the parts of a long text, in turns with other long work."""
    for at in range(0, len(text), MAX_PART):
        yield memoryview(text)[at : at + MAX_PART]
        await TURNS.wait(account_id, started=True)


class UpstreamSocketLost(Exception):
    """No upstream could be reached."""
