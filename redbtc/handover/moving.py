"""Leave the connections of clients to another process."""

from __future__ import annotations

import asyncio
import os

from redbtc.handover.channel import MAX_FILES, Channel
from redbtc.handover.messages import Moved
from redbtc.server.connections import Connections
from redbtc.server.leaving import LeftConnection, leave, stay_here
from redbtc.server.listening import Server
from redbtc.server.protocol import HTTPProtocol

MAX_MOVED_BYTES = 1 << 20  # of what was received, in one message


class LeavingConnections:
    """The connections of a server that go on in another process, each as soon as no response is
    under way on it."""

    def __init__(self, server: Server, connections: Connections) -> None:
        """Take no new requests from now on."""
        self._server = server
        self._connections = connections
        self._left: list[LeftConnection] = []
        self._ending: set[asyncio.Task[None]] = set()
        self._sending = asyncio.Lock()
        connections.on_idle = self._take

    def take_all(self) -> None:
        """Take those that can be left now."""
        for each in list(self._server.server_state.connections):
            if isinstance(each, HTTPProtocol):
                self._take(each)

    def _take(self, protocol: HTTPProtocol) -> None:
        if left := leave(protocol):
            self._left.append(left)
            if left.task:
                self._ending.add(left.task)
                left.task.add_done_callback(self._ending.discard)

    async def until_ended(self, seconds: float) -> bool:
        """Wait until the requests have ended here that the other process is to serve. Return
        whether they have within so many seconds."""
        if self._ending:
            await asyncio.wait(set(self._ending), timeout=seconds)
        return not self._ending

    async def send(self, channel: Channel) -> None:
        """Hand over those that were taken. Return once all are sent, those of another call as well.
        Raises ChannelClosed."""
        async with self._sending:
            await self._send_left(channel)

    async def _send_left(self, channel: Channel) -> None:
        while self._left:
            batch, size = list[LeftConnection](), 0
            while self._left and len(batch) < MAX_FILES and size < MAX_MOVED_BYTES:
                batch.append(self._left.pop(0))
                size += len(batch[-1].received)
            message = Moved([each.received for each in batch])
            try:
                await channel.send(message, [each.file for each in batch])
            finally:
                for each in batch:
                    os.close(each.file)

    async def take_back(self) -> None:
        """Go on with all connections in this process."""
        self._connections.on_idle = None
        for each in self._left:
            await self._server.adopt(each.file, each.received)
        self._left.clear()
        for protocol in list(self._server.server_state.connections):
            if isinstance(protocol, HTTPProtocol):
                stay_here(protocol)
