"""Take connections from the server, for another process to go on with."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from redbtc.server.protocol import HTTPProtocol


class LeftConnection(NamedTuple):
    """A connection that is left to another process."""

    file: int  # its socket, for the caller to close
    received: bytes  # that was not served
    task: asyncio.Task[None] | None  # that ends the request here, if one had begun


def leave(protocol: HTTPProtocol) -> LeftConnection | None:
    """Leave the connection to another process, if no response is under way or unread. A request
    that is not admitted yet ends here, without an answer: the other process serves it. Return None
    where the connection has to stay."""
    connection, cycle = protocol.connection, protocol.cycle
    stream, received = connection.stream, None
    if connection.closed or stream.is_closing or stream.has_unsent:
        return None
    if connection.state == "idle":
        received = b""
    elif connection.state == "head" and protocol.head:
        received = protocol.head.received
    elif connection.state == "serving" and cycle:
        received = cycle.rebuilt()
    if received is None:
        return None
    left = LeftConnection(stream.copy(), received + stream.kept, cycle.task if cycle else None)
    protocol.on_leave.clear()
    if left.task:
        left.task.cancel()
    connection.closed = True
    stream.abort()
    return left


def stay_here(protocol: HTTPProtocol) -> None:
    """Serve what has arrived on a connection while `Connections.on_idle` was set, and read on."""
    if protocol.connection.state == "idle":
        protocol.continue_soon()
