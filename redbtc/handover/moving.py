"""Leave the connections of clients to another process."""

from __future__ import annotations

import asyncio
import logging
import os

from redbtc.handover.channel import MAX_FILES, Channel
from redbtc.handover.messages import Moved
from redbtc.server.connections import Connections
from redbtc.server.leaving import LeftConnection, leave, stay_here
from redbtc.server.listening import Server
from redbtc.server.protocol import HTTPProtocol
from redbtc.telemetry import log

MAX_MOVED_BYTES = 1 << 20  # of what was received, in one message


def moved_connections(message: Moved, files: list[int]) -> list[tuple[int, bytes]]:
    """Return the files of connections that another process has left, with what was received on
    each. The last ones are lost if this process has reached its limit of open files."""
    if lost := len(message.received) - len(files):
        log(logging.ERROR, "connections lost", number=lost)
    return list(zip(files, message.received, strict=False))


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
        try:
            left = leave(protocol)
        except OSError:  # too many open files; once some were sent, it can be taken
            return
        if left:
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

    async def send(self, channel: Channel) -> bool:
        """Hand over those that were taken, and return whether there were any. When this returns,
        all are sent, those of another call as well. Raises ChannelClosed."""
        async with self._sending:
            had_any = bool(self._left)
            await self._send_left(channel)
            return had_any

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
